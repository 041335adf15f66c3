"""Whole-unit transfers outside the hot path: import of weights, and reading states back for export and tests."""

import torch

from ratel import native
from ratel.plan.placement import GPU, SSD
from ratel.store.planes import Plane, Store


class UnitTransfer:
    """Moves one unit's planes between their tier and ordinary memory through one scratch buffer, synchronously."""

    def __init__(self, store: Store, engine: "native.nvme_ds.Engine | None", pool: "native.op_ds.Pool") -> None:
        self._store, self._engine, self._pool = store, engine, pool

    def write_weights(self, unit: int, master: torch.Tensor) -> None:
        """Split a fp32 CPU master (1-D, the unit's layout) and write `hi` and `lo` where they live."""
        hi = aligned_empty(master.numel(), torch.bfloat16)
        lo = aligned_empty(master.numel(), torch.int16)
        self._pool.split(master.data_ptr(), hi.data_ptr(), lo.data_ptr(), master.numel())
        for name, values in (("hi", hi), ("lo", lo)):
            if self._store.has(unit, name):
                self.write(unit, name, values[: self._store.plane(unit, name).num_elements])

    def read_weights(self, unit: int) -> torch.Tensor:
        """The fp32 master, 1-D on the CPU; frozen parameters in bf16 runs have no `lo` and come back as bf16 values."""
        hi = self.read(unit, "hi")
        lo = torch.zeros(hi.numel(), dtype=torch.int16)
        if self._store.has(unit, "lo"):
            kept = self.read(unit, "lo")
            lo[: kept.numel()] = kept
        master = torch.empty(hi.numel(), dtype=torch.float32)
        self._pool.merge(hi.data_ptr(), lo.data_ptr(), master.data_ptr(), hi.numel())
        return master

    def write(self, unit: int, name: str, values: torch.Tensor) -> None:
        plane = self._store.plane(unit, name)
        if plane.tier == SSD:
            self._ssd(plane, values, write=True)
        else:
            plane.tensor.copy_(values)

    def read(self, unit: int, name: str) -> torch.Tensor:
        """A copy in ordinary CPU memory."""
        plane = self._store.plane(unit, name)
        if plane.tier == SSD:
            values = aligned_empty(plane.num_elements, plane.dtype)
            self._ssd(plane, values, write=False)
            return values
        return plane.tensor.to("cpu", copy=True) if plane.tier == GPU else plane.tensor.clone()

    def clear(self, unit: int, name: str) -> None:
        """Zero a plane. A new volume reads as zeros, so on SSD there is nothing to write."""
        plane = self._store.plane(unit, name)
        if plane.tier != SSD:
            plane.tensor.zero_()

    def _ssd(self, plane: Plane, values: torch.Tensor, *, write: bool) -> None:
        submit = self._engine.submit_write if write else self._engine.submit_read
        assert values.data_ptr() % 4096 == 0 and values.is_contiguous()
        ticket = submit(self._store.volume, plane.offset, values.data_ptr(), plane.num_bytes, native.nvme_ds.OPTIMIZER)
        self._engine.wait(ticket)


def aligned_empty(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised CPU memory that direct I/O accepts: page aligned."""
    raw = torch.empty(num_elements * dtype.itemsize + 4096, dtype=torch.uint8)
    skip = -raw.data_ptr() % 4096
    return raw[skip : skip + num_elements * dtype.itemsize].view(dtype)
