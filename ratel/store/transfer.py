"""Whole-unit transfers outside the hot path: import of weights, and reading states back for export
and tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ratel import native
from ratel.memory.arena import keep_mapped
from ratel.planner.formats import FP32
from ratel.planner.placement import DRAM, SSD
from ratel.planner.shape import UnitSpec
from ratel.planner.slot_layout import pieces
from ratel.store.encodings import recode
from ratel.store.plane_io import PlaneIO
from ratel.store.planes import Store
from ratel.units import align_up

PIECE_ELEMENTS = 1 << 22
"""Moved at once, a multiple of every grain: the halves of a large unit never exist beside its
master as a whole."""


class UnitTransfer:
    """Moves one unit's planes between their tier and ordinary memory, synchronously."""

    def __init__(self, store: Store, io: PlaneIO, pool: "native.op_ds.Pool",
                 engine: "native.nvme_ds.Engine | None") -> None:
        self._store, self._io, self._pool, self._engine = store, io, pool, engine

    def write_weights(self, unit: UnitSpec, master: torch.Tensor, first: int = 0) -> None:
        """Split a fp32 CPU master (1-D, the unit's layout) and write `hi` and `lo` where they live.
        ``first``: of the segment that writing begins with."""
        size = min(PIECE_ELEMENTS, master.numel())
        halves = {"hi": aligned_empty(size, torch.bfloat16), "lo": aligned_empty(size, torch.int16)}
        for begin, end in pieces(unit, master.numel(), size):
            if begin < first:
                continue
            part = master[begin:end]
            self._pool.split(part.data_ptr(), *(half.data_ptr() for half in halves.values()), part.numel())
            for name, half in halves.items():
                if begin < self._count(unit, name):
                    self._move(unit, name, begin, half[: end - begin], write=True)

    def fill_upper_half(self, unit: UnitSpec, begin: int, end: int, fill: Callable[[Tensor], None]) -> None:
        """Let ``fill`` write elements of `hi`: in place where that is DRAM, else into a buffer that
        is moved from there. From any thread."""
        plane = self._store.plane(unit.index, "hi")
        if plane.tier == DRAM:
            fill(plane.tensor[begin:end])
            return
        buffer = aligned_empty(end - begin, torch.bfloat16)
        fill(buffer)
        self._move(unit, "hi", begin, buffer, write=True)

    def read_weights(self, unit: UnitSpec) -> torch.Tensor:
        """The fp32 master, 1-D on the CPU; frozen parameters in bf16 runs have no `lo` and come
        back as bf16 values."""
        master = torch.empty(self._count(unit, "hi"), dtype=torch.float32)
        for begin, values in self.weight_pieces(unit):
            master[begin : begin + values.numel()] = values
        return master

    def weight_pieces(self, unit: UnitSpec) -> Iterator[tuple[int, torch.Tensor]]:
        """The weights of `read_weights` in pieces from the first to the last: ``(begin, values)``,
        each in the memory of the one before."""
        count = self._count(unit, "hi")
        size = min(PIECE_ELEMENTS, count)
        hi, lo, master = (aligned_empty(size, dtype) for dtype in (torch.bfloat16, torch.int16, torch.float32))
        for begin, end in pieces(unit, count, size):
            values = master[: end - begin]
            self._move(unit, "hi", begin, hi[: end - begin], write=False)
            if begin < self._count(unit, "lo"):
                self._move(unit, "lo", begin, lo[: end - begin], write=False)
            else:
                lo.zero_()
            self._pool.merge(hi.data_ptr(), lo.data_ptr(), values.data_ptr(), values.numel())
            yield begin, values

    def write_moment(self, unit: UnitSpec, name: str, values: torch.Tensor) -> None:
        """Write fp32 numbers (page aligned), which become what the plane is stored as."""
        plane = self._store.plane(unit.index, name)
        if plane.encoding == FP32:
            self.write(unit, name, values)
            return
        for begin, end, stored in self._parts(unit, name):
            recode(values[begin:end], FP32, plane.encoding, stored)
            self._move(unit, name, begin, stored, write=True)

    def write(self, unit: UnitSpec, name: str, values: torch.Tensor) -> None:
        """``values`` as the plane stores them."""
        plane = self._store.plane(unit.index, name)
        for begin, end in pieces(unit, plane.encoding.count(values.numel()), PIECE_ELEMENTS):
            self._move(unit, name, begin, plane.part(begin, end, values), write=True)

    def read(self, unit: UnitSpec, name: str) -> torch.Tensor:
        """A copy in ordinary CPU memory, as the plane stores it."""
        plane = self._store.plane(unit.index, name)
        values = aligned_empty(plane.encoding.place(plane.num_elements), plane.dtype)
        for begin, end in pieces(unit, plane.num_elements, PIECE_ELEMENTS):
            self._move(unit, name, begin, plane.part(begin, end, values), write=False)
        return values

    def read_moment(self, unit: UnitSpec, name: str) -> torch.Tensor:
        """The numbers, in fp32."""
        plane = self._store.plane(unit.index, name)
        if plane.encoding == FP32:
            return self.read(unit, name)
        values = torch.empty(plane.num_elements, dtype=torch.float32)
        for begin, end, stored in self._parts(unit, name):
            self._move(unit, name, begin, stored, write=False)
            recode(stored, plane.encoding, FP32, values[begin:end])
        return values

    def _parts(self, unit: UnitSpec, name: str) -> Iterator[tuple[int, int, Tensor]]:
        """``(begin, end, memory)`` of a plane's pieces: the same memory for all, never that of the
        whole plane."""
        plane = self._store.plane(unit.index, name)
        size = min(PIECE_ELEMENTS, plane.num_elements)
        memory = aligned_empty(plane.encoding.place(size), plane.dtype)
        for begin, end in pieces(unit, plane.num_elements, size):
            yield begin, end, plane.part(0, end - begin, memory)

    def recall(self, unit: UnitSpec, name: str) -> None:
        """Bring what is trained of a plane that lives elsewhere from the copy that a commit has
        made of it on SSD."""
        plane = self._store.plane(unit.index, name)
        size = min(PIECE_ELEMENTS, plane.num_elements)
        buffer = aligned_empty(plane.encoding.place(size), plane.dtype)
        for begin, end in pieces(unit, min(plane.num_elements, unit.num_trainable), size):
            values = plane.part(0, end - begin, buffer)
            self._read(unit, name, begin, values)
            plane.part(begin, end).copy_(values)

    def frozen_pieces(self, unit: UnitSpec, name: str) -> Iterator[Tensor]:
        """What is frozen of a plane, from its first element on, each piece in memory of its own
        call."""
        plane = self._store.plane(unit.index, name)
        buffer = aligned_empty(min(PIECE_ELEMENTS, plane.num_elements), plane.dtype)
        for begin, end in pieces(unit, plane.num_elements, buffer.numel()):
            if begin >= unit.num_trainable:
                self._move(unit, name, begin, buffer[: end - begin], write=False)
                yield buffer[: end - begin]

    def start_at_zero(self, unit: UnitSpec, name: str) -> None:
        """A plane that nothing was written to yet is to be zeros. It is: in a new volume, in the
        arena, where the system has given fresh memory, and on the GPU, where the store has asked
        for zeros. Only the checksums do not know it."""
        plane = self._store.plane(unit.index, name)
        if plane.tier == SSD:
            self._store.checksums.record_zeros(unit.index, name, plane.dtype)

    def _count(self, unit: UnitSpec, name: str) -> int:
        return self._store.plane(unit.index, name).num_elements if self._store.has(unit.index, name) else 0

    def _move(self, unit: UnitSpec, name: str, begin: int, values: torch.Tensor, *, write: bool) -> None:
        """Move bytes between ``values`` and the part of the plane that starts at element
        ``begin``."""
        plane = self._store.plane(unit.index, name)
        if plane.tier != SSD:
            part = plane.part(begin, begin + plane.encoding.count(values.numel()))
            part.copy_(values) if write else values.copy_(part)
        elif write:
            self._import(unit, name, begin, values)
        else:
            self._read(unit, name, begin, values)

    def _import(self, unit: UnitSpec, name: str, begin: int, values: torch.Tensor) -> None:
        """Write into the current version."""
        assert values.data_ptr() % 4096 == 0 and values.is_contiguous()
        ticket = self._io.write(unit.index, name, begin, values, native.nvme_ds.OPTIMIZER,
                                self._store.slot_to_read(unit.index))
        with kept_if_stalled(values):
            self._engine.wait(ticket)

    def _read(self, unit: UnitSpec, name: str, begin: int, values: torch.Tensor) -> None:
        read = self._io.read(unit.index, name, begin, values, native.nvme_ds.OPTIMIZER)
        with kept_if_stalled(values):
            self._io.wait(read)


def aligned_empty(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised CPU memory that direct I/O accepts: page aligned, its last page whole."""
    raw = torch.empty(align_up(num_elements * dtype.itemsize, 4096) + 4096, dtype=torch.uint8)
    skip = -raw.data_ptr() % 4096
    return raw[skip : skip + num_elements * dtype.itemsize].view(dtype)


@contextmanager
def kept_if_stalled(values: torch.Tensor) -> Iterator[None]:
    """A device that has stopped answering may answer yet: the memory of its transfer is never used
    again."""
    try:
        yield
    except native.nvme_ds.StallError:
        keep_mapped(values)
        raise
