"""The engine's Python face: volumes, waiting that Ctrl-C can end, errors with their place. Data
never passes through Python."""

from __future__ import annotations

import ctypes
import errno as errno_module
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from nvme_ds import files, native
from nvme_ds.errors import StallError, canceled, checked, transfer_error
from nvme_ds.faults import faults
from nvme_ds.lifetime import SLICE_US, UNFINISHED, engines, is_stalled, remove_scratch, shut_down
from nvme_ds.making import make_volume
from nvme_ds.observation import IoSpan, counted, recorded_spans
from nvme_ds.options import BACKENDS, caps_by_directory, check_options, choose_backend
from nvme_ds.volume import PRIORITIES, Volume, refusal

__all__ = ["ACTIVATION", "ALIGNMENT", "BACKGROUND", "OPTIMIZER", "WEIGHT", "WRITEBACK", "Engine", "IoSpan", "remove_scratch"]

WEIGHT, ACTIVATION, OPTIMIZER, WRITEBACK, BACKGROUND = PRIORITIES
ALIGNMENT = files.ALIGNMENT



def _nothing() -> None:
    """What is done while waiting, where nothing else is said."""


class Engine:
    """Asynchronous reads and writes between memory and striped volumes, with one queue per
    directory.

    backend: ``auto`` takes io_uring where the kernel allows it, else threads; a forced choice that
    is impossible raises OSError. queue_depth: requests the kernel holds per directory. num_threads:
    per directory, of the ``threads`` backend. request_bytes: longest single request. bandwidth_bps:
    cap per directory on reads and writes together, one number or ``{directory: bytes per second}``.
    stall_timeout_s: how long the kernel may hold requests of a directory without answering any
    before waiting raises StallError. while_waiting: called ten times a second by a thread that
    waits for a transfer; it may raise, and the ticket can be waited for again.
    """

    def __init__(self, backend: str = "auto", queue_depth: int = 32, num_threads: int = 16, request_bytes: int = 1 << 20,
                 bandwidth_bps: float | Mapping[str, float] | None = None, stall_timeout_s: float = 120.0,
                 while_waiting: Callable[[], None] = _nothing) -> None:
        check_options(backend, queue_depth, num_threads, request_bytes, stall_timeout_s)
        self._native = native.library()
        self.backend = choose_backend(self._native, backend, queue_depth)
        self.request_bytes = request_bytes
        self.stall_timeout_s = stall_timeout_s
        self._caps = caps_by_directory(bandwidth_bps)
        options = native.EngineOptions(BACKENDS[self.backend], queue_depth, num_threads, request_bytes,
                                       int(stall_timeout_s * 1e9))
        self._handle = checked(self._native.engine_create(ctypes.byref(options)), "creating the engine")
        self.scratch: dict[int, list[tuple[str, files.Inode]]] = {}
        """The files of each volume that go with it, or else with the engine. Only these, not what
        took their names since."""
        self._process = os.getpid()
        self._while_waiting = while_waiting
        self._finalizer = weakref.finalize(self, shut_down, self._native, self._handle, self._process, self.scratch)
        engines.add(self)
        self._devices: dict[str, int] = {}
        self._volumes: dict[int, Volume] = {}
        self._buffers: dict[int, int] = {}
        self._lock = threading.RLock()  # whoever an exception leaves it with can still close
        self._thread_local = threading.local()
        self._closed = False
        self._abandoned = False
        self._no_direct = False
        self._watching = 0

    # Volumes

    def create_volume(self, directories: Sequence[str | os.PathLike], name: str, num_bytes: int,
                      stripe_bytes: int = 1 << 20, weights: Sequence[float] | None = None, direct: str = "auto",
                      keep: bool = False, *, tail: Callable[[int], bytes] = lambda index: b"",
                      may_replace: files.MayReplace = lambda fd: True) -> Volume:
        """New files ``<directory>/<name>.<index>``, allocated in full and read as zeros.

        weights: share of each directory, its bandwidth for example; equal by default. direct:
        O_DIRECT ``auto`` (fall back to buffered I/O with a warning, now or when a transfer is
        refused; see ``Volume.direct``), ``on`` (raise instead) or ``off``. keep: leave the files.
        tail: by index, what a file carries behind the volume's bytes, a multiple of 4096 bytes; it
        is on disk before the file takes space. may_replace: of a file that has such a name already,
        whether it may go. Raises NoSpaceError before anything is written, OSError for a directory
        that is missing or not writable, and for a name that a link has, a file in use, one with
        other names, or one that may not go.
        """
        def make(paths: list[str], sizes: list[int], undo: ExitStack) -> list[int]:
            tails = [tail(index) for index in range(len(paths))]
            return files.create_files(paths, [size + len(end) for size, end in zip(sizes, tails)], tails, may_replace, undo)

        return make_volume(self, make, directories, name, num_bytes, stripe_bytes, weights, direct, keep)

    def open_volume(self, directories: Sequence[str | os.PathLike], name: str, num_bytes: int,
                    stripe_bytes: int = 1 << 20, weights: Sequence[float] | None = None, direct: str = "auto",
                    keep: bool = True, *, tail_bytes: int = 0) -> Volume:
        """Files made by ``create_volume`` with the same arguments. Files of another size raise
        OSError (EINVAL)."""
        def find(paths: list[str], sizes: list[int], undo: ExitStack) -> list[int]:
            return files.open_files(paths, [size + tail_bytes for size in sizes], undo)

        return make_volume(self, find, directories, name, num_bytes, stripe_bytes, weights, direct, keep)

    def device(self, folder: str) -> int:
        with self._lock:
            if folder not in self._devices:
                cap_bps = self._caps.get(folder, self._caps.get(None, 0.0))
                index = self._native.device_add(self._handle, cap_bps)
                self._devices[folder] = checked(index, f"a queue for {folder}")
            return self._devices[folder]

    def _sync_volume(self, volume: Volume) -> None:
        self.require_open()
        ticket = self._native.submit_sync(self._handle, volume.handle)
        if ticket < 0:
            self._refuse(-ticket, volume, 0, 0, 0, 0)
        self.wait(ticket)

    def _close_volume(self, volume: Volume) -> None:
        with self._lock:
            self._volumes.pop(volume.handle, None)
        self._native.volume_close(self._handle, volume.handle)

    # Memory

    def register_buffer(self, address: int, num_bytes: int) -> None:
        """Let the kernel keep this memory mapped (io_uring fixed buffers). Only speed depends on
        it.

        Where it is impossible (RLIMIT_MEMLOCK, the threads backend) plain requests are used, and
        ``stats()["fixed_buffers"]`` says why. Unregister before the memory is freed: its pages stay
        in use until then.
        """
        checked(self._native.buffer_register(self._handle, address, num_bytes), "registering a buffer")
        self._buffers[address] = num_bytes

    def unregister_buffer(self, address: int) -> None:
        checked(self._native.buffer_unregister(self._handle, address), "unregistering a buffer")
        del self._buffers[address]

    # Transfers

    def submit_read(self, volume: Volume, offset: int, address: int, num_bytes: int, priority: int) -> int:
        """Start ``memory[address:] = volume[offset:offset + num_bytes]``; returns a ticket. The
        memory must stay valid until the ticket is done. Offset, address and size are multiples of
        4096."""
        if self._closed:
            self.require_open()
        ticket = self._native.submit(self._handle, volume.handle, 0, offset, address, num_bytes, priority)
        return ticket if ticket > 0 else self._refuse(-ticket, volume, offset, address, num_bytes, priority)

    def submit_write(self, volume: Volume, offset: int, address: int, num_bytes: int, priority: int) -> int:
        """Start ``volume[offset:offset + num_bytes] = memory[address:]``; otherwise as
        ``submit_read``. Transfers in flight together are not ordered: wait for one before
        submitting another that overlaps it."""
        if self._closed:
            self.require_open()
        ticket = self._native.submit(self._handle, volume.handle, 1, offset, address, num_bytes, priority)
        return ticket if ticket > 0 else self._refuse(-ticket, volume, offset, address, num_bytes, priority)

    def done(self, ticket: int) -> bool:
        """Whether ``wait`` would return (or raise) at once."""
        if self._closed:
            self.require_open()
        status = self._native.done(self._handle, ticket)
        if status < 0:
            self._raise_for(status, None)
        return bool(status)

    def wait(self, ticket: int, timeout_s: float | None = None) -> None:
        """Block until the transfer is over, without the GIL. Once per ticket, from any thread.
        IoError if it failed.

        TimeoutError (after ``timeout_s``) and StallError (its device has stopped answering) say
        that it still runs: the memory stays in use and the ticket can be waited for again. Ctrl-C
        gets through.
        """
        if self._closed:
            self.require_open()
        failure = self._failure()
        status = self._native.poll(self._handle, ticket, 0, failure)
        if status == -errno_module.EINPROGRESS:
            status = self._wait_in_slices(ticket, timeout_s, failure)
        if status == native.FELL_BACK:
            files.say_buffered(os.fsdecode(failure.path), os.strerror(failure.error))
            for volume in self._volumes_with(os.fsdecode(failure.path)):
                volume.direct = False
        elif status:
            self._raise_for(status, failure)

    def wait_all(self, tickets: Iterable[int]) -> None:
        """Wait for every ticket, then raise the first error among them, if any: the memory is free
        to reuse either way. StallError is raised at once, and leaves this ticket and those after it
        to be waited for again."""
        first_error: OSError | None = None
        for ticket in tickets:
            try:
                self.wait(ticket)
            except StallError:
                raise
            except OSError as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error

    def _wait_in_slices(self, ticket: int, timeout_s: float | None, failure) -> int:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        status = -errno_module.EINPROGRESS
        while not self._abandoned:
            left_us = SLICE_US if deadline_s is None else int((deadline_s - time.monotonic()) * 1e6)
            if left_us <= 0:
                raise TimeoutError(f"ticket {ticket} is not done after {timeout_s} s")
            self._while_waiting()
            before, status = status, self._native.wait(self._handle, ticket, min(left_us, SLICE_US), failure)
            if status not in UNFINISHED or is_stalled(before, status):
                return status
        raise canceled()

    # Observation and faults

    def stats(self) -> dict:
        """Counters since the start or ``reset_stats``, in all and per directory.

        Bytes are those the kernel reported as transferred; ``busy_s`` is the time with a request in
        flight or held back by the bandwidth cap.
        """
        with self._lock:
            devices = dict(self._devices)
        error = -self._native.buffer_error(self._handle) if self._buffers else None
        fixed = "none registered" if error is None else "off: " + os.strerror(error) if error else "on"
        return {"backend": self.backend, "fixed_buffers": fixed, **counted(self._native, self._handle, devices)}

    def watch(self, capacity: int) -> None:
        """Record what each directory does from now on, ``capacity`` spans (64 bytes each) at most;
        0 ends it and forgets."""
        checked(self._native.watch(self._handle, capacity), "watching")
        self._watching = capacity

    def spans(self) -> tuple[list[IoSpan], int]:
        """What has been recorded since ``watch``, and how many requests found no room.

        Requests of one transfer that a directory worked on together are one span. Only what is over
        is in it.
        """
        with self._lock:
            devices = dict(self._devices)
        return recorded_spans(self._native, self._handle, devices, self._watching)

    def reset_stats(self) -> None:
        self._native.counters_reset(self._handle)

    def inject(self, *, no_direct: bool = False, **given: Any) -> None:
        """Test hook; each call replaces the last, so a call without arguments turns everything off.
        ``given``: as `nvme_ds.faults.faults` takes it. no_direct: volumes made from now on find no
        O_DIRECT."""
        self._native.inject(self._handle, ctypes.byref(faults(**given)))
        self._no_direct = no_direct

    # The end

    def close(self, timeout_s: float | None = None) -> None:
        """Cancel what waits, let the kernel finish what it has (it writes into the caller's
        memory), end the threads, close the volumes. Waiters of cancelled tickets get
        IoError(ECANCELED). TimeoutError when a device keeps requests longer than ``timeout_s`` or
        has stopped answering; then close() may be called again, or abandon().
        """
        self._closed = True
        if self._abandoned or self.is_foreign:
            return
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        before = -errno_module.EINPROGRESS
        while (status := self._native.engine_close(self._handle, SLICE_US)) in UNFINISHED:
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise TimeoutError(f"requests are still in flight after {timeout_s} s")
            if is_stalled(before, status):
                raise TimeoutError(f"requests are in flight and none was answered for {self.stall_timeout_s} s")
            before = status
        self._finalizer.detach()
        self._native.engine_destroy(self._handle)
        for volume in list(self._volumes.values()):
            volume.close()

    def abandon(self) -> None:
        """Give up an engine that close() cannot end: every further call is refused, nothing waits
        for it any more, not even the interpreter at its exit. Idempotent.

        Threads, files, locks on them and registered memory stay with the process. The device may
        still answer: memory of transfers that were not seen to be over must stay mapped and unused
        until the process ends.
        """
        self._closed = self._abandoned = True
        self._finalizer.detach()
        with self._lock:
            for volume in self._volumes.values():
                volume._give_up()  # before another thread's close() ends and would remove their files
        self._native.engine_abandon(self._handle)  # also cancels what the kernel does not have yet

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _failure(self):
        """This thread's own structure for reports from native code, made once."""
        try:
            return self._thread_local.failure
        except AttributeError:
            self._thread_local.failure = native.Failure()
            return self._thread_local.failure

    @property
    def is_foreign(self) -> bool:
        """Whether this process is a child that was forked from the one whose engine it is."""
        return os.getpid() != self._process

    def require_open(self) -> None:
        if self.is_foreign:
            raise RuntimeError("an Engine does not survive fork, its threads stay in the parent: make one per process")
        if self._closed:
            raise canceled()

    def _raise_for(self, status: int, failure) -> None:
        if status == 0:
            return
        if failure is not None and failure.error:
            is_direct = any(volume.direct for volume in self._volumes_with(os.fsdecode(failure.path)))
            raise transfer_error(failure, is_stalled=status == native.STALLED, is_direct=is_direct)
        if self._closed:
            raise canceled()
        if status == -errno_module.ESRCH:
            raise ValueError("no such ticket: it was never given out, or was waited for before")
        raise OSError(-status, os.strerror(-status))

    def _volumes_with(self, path: str) -> list[Volume]:
        with self._lock:
            return [volume for volume in self._volumes.values() if path in volume.paths]

    def _refuse(self, error: int, *what: Any) -> int:
        if self._closed:
            raise canceled()
        raise refusal(error, *what)
