"""Quick measurements, seconds in all: enough to see that a machine works as it should, not a
planner's probe."""

import mmap
import time
from collections.abc import Callable
from typing import Any

import torch

from ratel import native
from ratel.memory.anonymous import anonymous_map
from ratel.units import MIB

_DISK_BYTES, _PIECE_BYTES, _DISK_LIMIT_S = 256 * MIB, 16 * MIB, 3.0
_COPY_BYTES, _COPY_REPEATS = 256 * MIB, 4
_ADAMW_PARAMS, _ADAMW_LIMIT_S = 8 << 20, 1.0
_LINE = 64
"""Elements; what every plane of a session begins at a multiple of."""


def measure_disk(directory: str, *, io_backend: str = "auto") -> dict[str, Any]:
    """Sequential rates of up to 256 MiB in requests of 1 MiB, past the page cache where the file
    system allows it."""
    with mmap.mmap(-1, _DISK_BYTES) as memory:
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        buffer.random_(0, 256)  # some devices compress, and then zeros measure nothing
        engine = native.nvme_ds.Engine(backend=io_backend)
        try:
            volume = engine.create_volume([directory], "ratel-doctor", _DISK_BYTES)
            try:
                rates = _disk_rates(engine, volume, buffer.data_ptr())
            finally:
                volume.close(unlink=True)
            return {"backend": engine.backend, "direct": volume.direct, **rates}
        finally:
            engine.close()
            del buffer


def _disk_rates(engine: Any, volume: Any, address: int) -> dict[str, float]:
    # Written first: reading a file that was only allocated returns zeros without touching the
    # device.
    write_bps, num_bytes = _transfer(engine, engine.submit_write, volume, address, _DISK_BYTES)
    volume.sync()
    read_bps, _ = _transfer(engine, engine.submit_read, volume, address, num_bytes)
    return {"write_bps": write_bps, "read_bps": read_bps}


def _transfer(engine: Any, submit: Callable[..., int], volume: Any, address: int, num_bytes: int) -> tuple[float, int]:
    """Rate and bytes moved: two pieces in flight, none started past the time limit."""
    start, offset, tickets = time.perf_counter(), 0, []
    while offset < num_bytes and time.perf_counter() - start < _DISK_LIMIT_S:
        tickets.append(submit(volume, offset, address + offset, _PIECE_BYTES, native.nvme_ds.WEIGHT))
        offset += _PIECE_BYTES
        if len(tickets) > 1:
            engine.wait(tickets.pop(0))
    engine.wait_all(tickets)
    return offset / (time.perf_counter() - start), offset


def measure_copies(device: torch.device) -> dict[str, float]:
    """Pinned host-to-device and device-to-host rates, one direction at a time."""
    host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    return {
        "h2d_bps": _copy_rate(lambda: there.copy_(host, non_blocking=True), device),
        "d2h_bps": _copy_rate(lambda: host.copy_(there, non_blocking=True), device),
    }


def _copy_rate(copy: Callable[[], object], device: torch.device) -> float:
    copy()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(_COPY_REPEATS):
        copy()
    torch.cuda.synchronize(device)
    return _COPY_BYTES * _COPY_REPEATS / (time.perf_counter() - start)


def measure_adamw(num_threads: int, *, num_params: int = _ADAMW_PARAMS, limit_s: float = _ADAMW_LIMIT_S) -> dict[str, Any]:
    """Parameters per second of the native AdamW on split masters with bf16 gradients."""
    with AdamwRates(num_threads, num_params) as found:
        return {"isa": found.isa, "threads": num_threads, "params_per_s": found.in_place(limit_s)}


class AdamwRates:
    """Parameters per second of the native AdamW on split masters with bf16 gradients, several times
    over the same memory.

    Nothing is left as zeros that were never written: the kernel maps one page, which stays in the
    caches, for all of them.
    """

    def __init__(self, num_threads: int, num_params: int) -> None:
        self._count, self._planes = num_params, _adamw_planes(num_params)
        self._pool, self._step = native.op_ds.Pool(num_threads), 0
        try:
            for plane in self._planes:
                self._pool.fill(plane.data_ptr(), plane.nbytes, 0x3A)
        except BaseException:
            self.close()
            raise

    @property
    def isa(self) -> str:
        return self._pool.isa

    def in_place(self, limit_s: float) -> float:
        return self._rate(self._count, 0, limit_s)

    def elsewhere(self, limit_s: float) -> float:
        """What is read is left, and the results go to the other half of the memory, as in updates
        that may have to be forgotten."""
        half = self._count // 2 // _LINE * _LINE
        return self._rate(half, half, limit_s) if half else self.in_place(limit_s)

    def _rate(self, count: int, offset: int, limit_s: float) -> float:
        grad, *planes = self._planes
        places, targets = (tuple(plane[first:].data_ptr() for plane in planes) for first in (0, offset))

        def update() -> None:
            self._step += 1
            self._pool.adamw(*places, grad.data_ptr(), count, to=targets, grad_dtype="bf16", lr=1e-3, beta1=0.9, beta2=0.999,
                             eps=1e-8, step=self._step, grad_scale=1.0, ranges=[(count, 0.0)])

        update()
        start, repeats = time.perf_counter(), 0
        while repeats < 2 or time.perf_counter() - start < limit_s:
            repeats += 1
            update()
        return count * repeats / (time.perf_counter() - start)

    def close(self) -> None:
        self._pool.close()
        self._planes = []

    def __enter__(self) -> "AdamwRates":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _adamw_planes(count: int) -> list[torch.Tensor]:
    """Gradients, `hi` and `lo` of two bytes, and both moments, in the kind of memory that a session
    has them in."""
    dtypes = [torch.bfloat16] * 3 + [torch.float32] * 2
    return [torch.frombuffer(anonymous_map(count * dtype.itemsize), dtype=dtype) for dtype in dtypes]
