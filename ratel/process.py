"""A command as a process of its own: streams that cannot end it, and signals that always do."""

import io
import math
import os
import select
import signal
import sys
import threading
import time
from typing import NoReturn

from ratel import interrupt

EXIT_INTERRUPTED = 130
_SHOWN_S = 1.0
"""Seconds that a run waits for a reader of its progress who does not read; then it drops lines
until he does."""
_CHUNK_BYTES = 4096
"""PIPE_BUF: what a pipe that is ready takes without blocking."""
_ENDING_S = 30.0
"""Seconds for what was asked to end at once: files are removed and threads joined. Then it is
ended."""

_HANDLED_S = 0.5
"""Seconds for the main thread to come to its handler."""


class Channel(io.RawIOBase):
    """A descriptor for a text stream. Nothing that happens to it is raised; ``error`` is what
    did."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self.is_dropping, self.may_drop = descriptor, False, False
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: bytes) -> int:
        left = memoryview(data).cast("B")
        count = len(left)
        try:
            while left and self._is_ready():
                try:
                    left = left[os.write(self._descriptor, left[:_CHUNK_BYTES]) :]
                except BlockingIOError:  # of a pipe that somebody has made so, between two looks
                    time.sleep(0.01)
        except OSError as error:
            self.error = self.error or error
        return count

    def _is_ready(self) -> bool:
        """Whether somebody takes what is written: a reader who has stopped would stop the run."""
        until_s = time.monotonic() + (0.0 if self.is_dropping else _SHOWN_S)
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        while not poll.poll(1000 * interrupt.POLL_S * (not self.is_dropping)):
            if self.may_drop and time.monotonic() >= until_s:
                self.is_dropping = True
                return False
            interrupt.check()
        self.is_dropping = False
        return True


def settle_streams() -> tuple[Channel, Channel]:
    """Standard output and error as channels. A descriptor that is closed leads nowhere from now on:
    else the next file that is opened, of states perhaps, would have its number, and what is meant
    for a terminal be written into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
    channels = Channel(1), Channel(2)
    for name, channel in zip(("stdout", "stderr"), channels):
        stream = getattr(sys, name)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = io.TextIOWrapper(channel, encoding, errors="backslashreplace", line_buffering=True, write_through=True)
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
    return channels


def watch_signals() -> None:
    """Watch signals from now on, and until the process is gone."""
    watch = interrupt.Watch(interrupt.SIGNALS, answer=interrupt.end_here, insist=lambda *unused: leave())
    watch.begin()
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(reader, True)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_guard, args=(reader, watch), name="ratel-signals", daemon=True).start()


def _guard(reader: int, watch: interrupt.Watch) -> None:
    """Handlers run when the main thread comes back to Python. In a library's long call, or in the
    kernel, it does not."""
    seen = interrupt.Count()
    until_s = math.inf
    while time.monotonic() < until_s:
        if not select.select([reader], [], [], min(until_s - time.monotonic(), _ENDING_S) if until_s < math.inf else None)[0]:
            continue
        if not seen.add(os.read(reader, 1)[0]):
            continue
        time.sleep(_HANDLED_S)
        seen.number = max(seen.number, watch.count.number)
        left = watch.requests_left() - (seen.number - watch.count.number)
        if left <= 0:
            break
        if left == 1:  # it is due
            until_s = min(until_s, time.monotonic() + _ENDING_S)
    leave()


def leave() -> NoReturn:
    """End the process at once, as if killed, but for the files that no later start would look for.
    States on disk are whole at any moment."""
    engines = sys.modules.get("nvme_ds.engine")
    if engines is not None:
        engines.remove_scratch()
    interrupt.say("ratel: interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def begin() -> tuple[Channel, Channel]:
    """Begin the command's signals and output; called once, before anything else."""
    global _channels
    if _channels is None:
        _channels = settle_streams()
        watch_signals()
    return _channels


def may_drop(is_beside: bool) -> None:
    """Whether what is printed comes beside the results, and need not wait for whoever reads it."""
    for channel in _channels or ():
        channel.may_drop = is_beside


_channels: tuple[Channel, Channel] | None = None
