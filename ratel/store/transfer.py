"""Whole-unit transfers outside the hot path: import of weights, and reading states back for export and tests."""

import torch

from ratel import native
from ratel.plan.placement import SSD
from ratel.store.planes import Plane, Store

PIECE_ELEMENTS = 1 << 22
"""Of a master that is split or merged at once: so the halves of a large unit never exist beside it as a whole."""


class UnitTransfer:
    """Moves one unit's planes between their tier and ordinary memory, synchronously."""

    def __init__(self, store: Store, engine: "native.nvme_ds.Engine | None", pool: "native.op_ds.Pool") -> None:
        self._store, self._engine, self._pool = store, engine, pool

    def write_weights(self, unit: int, master: torch.Tensor) -> None:
        """Split a fp32 CPU master (1-D, the unit's layout) and write `hi` and `lo` where they live."""
        size = min(PIECE_ELEMENTS, master.numel())
        halves = {"hi": aligned_empty(size, torch.bfloat16), "lo": aligned_empty(size, torch.int16)}
        for begin in range(0, master.numel(), size):
            part = master[begin : begin + size]
            self._pool.split(part.data_ptr(), *(half.data_ptr() for half in halves.values()), part.numel())
            for name, half in halves.items():
                count = min(self._count(unit, name) - begin, part.numel())
                if count > 0:
                    self._move(unit, name, begin, half[:count], write=True)

    def read_weights(self, unit: int) -> torch.Tensor:
        """The fp32 master, 1-D on the CPU; frozen parameters in bf16 runs have no `lo` and come back as bf16 values."""
        master = torch.empty(self._count(unit, "hi"), dtype=torch.float32)
        size = min(PIECE_ELEMENTS, master.numel())
        hi, lo = aligned_empty(size, torch.bfloat16), aligned_empty(size, torch.int16)
        for begin in range(0, master.numel(), size):
            part = master[begin : begin + size]
            with_lo = min(max(self._count(unit, "lo") - begin, 0), part.numel())
            self._move(unit, "hi", begin, hi[: part.numel()], write=False)
            if with_lo:
                self._move(unit, "lo", begin, lo[:with_lo], write=False)
            lo[with_lo:] = 0
            self._pool.merge(hi.data_ptr(), lo.data_ptr(), part.data_ptr(), part.numel())
        return master

    def write(self, unit: int, name: str, values: torch.Tensor) -> None:
        self._move(unit, name, 0, values, write=True)

    def read(self, unit: int, name: str) -> torch.Tensor:
        """A copy in ordinary CPU memory."""
        plane = self._store.plane(unit, name)
        values = aligned_empty(plane.num_elements, plane.dtype)
        self._move(unit, name, 0, values, write=False)
        return values

    def clear(self, unit: int, name: str) -> None:
        """Zero a plane. A new volume reads as zeros, so on SSD there is nothing to write."""
        plane = self._store.plane(unit, name)
        if plane.tier != SSD:
            plane.tensor.zero_()

    def _count(self, unit: int, name: str) -> int:
        return self._store.plane(unit, name).num_elements if self._store.has(unit, name) else 0

    def _move(self, unit: int, name: str, begin: int, values: torch.Tensor, *, write: bool) -> None:
        """Between ``values`` and the part of the plane that starts at element ``begin``."""
        plane = self._store.plane(unit, name)
        if plane.tier == SSD:
            self._ssd(plane, begin, values, write=write)
            return
        part = plane.tensor[begin : begin + values.numel()]
        part.copy_(values) if write else values.copy_(part)

    def _ssd(self, plane: Plane, begin: int, values: torch.Tensor, *, write: bool) -> None:
        submit = self._engine.submit_write if write else self._engine.submit_read
        assert values.data_ptr() % 4096 == 0 and values.is_contiguous()
        ticket = submit(self._store.volume, plane.offset + begin * plane.dtype.itemsize, values.data_ptr(),
                        values.numel() * values.element_size(), native.nvme_ds.OPTIMIZER)
        self._engine.wait(ticket)


def aligned_empty(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised CPU memory that direct I/O accepts: page aligned."""
    raw = torch.empty(num_elements * dtype.itemsize + 4096, dtype=torch.uint8)
    skip = -raw.data_ptr() % 4096
    return raw[skip : skip + num_elements * dtype.itemsize].view(dtype)
