"""The one way between memory and a plane on SSD: which version, which place, which checksum."""

from dataclasses import dataclass

import torch

from ratel import native
from ratel.memory.tracing import Tracing
from ratel.planner.slot_layout import PAGE_BYTES
from ratel.store.planes import Store
from ratel.units import align_up


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes of a plane on their way into ``values``; right once `PlaneIO.wait` has returned."""

    ticket: int
    slot: int
    unit: int
    name: str
    begin: int
    values: torch.Tensor


def paged_bytes(values: torch.Tensor) -> int:
    """Whole pages are moved: a plane has its last one to itself, on SSD and in memory."""
    return align_up(values.nbytes, PAGE_BYTES)


class PlaneIO:
    """``begin`` counts elements of the plane; ``values`` are 1-D, contiguous, page aligned and in
    its dtype, and what memory is left of their last page is theirs."""

    def __init__(self, store: Store, engine: "native.nvme_ds.Engine | None", tracing: Tracing) -> None:
        self._store, self._engine, self._tracing = store, engine, tracing

    def read(self, unit: int, name: str, begin: int, values: torch.Tensor, priority: int) -> Read:
        """Start reading the current version."""
        slot = self._store.slot_to_read(unit)
        ticket = self._engine.submit_read(self._store.volume_of(unit, name, begin), self._store.offset(slot, unit, name, begin),
                                          values.data_ptr(), paged_bytes(values), priority)
        return Read(ticket, slot, unit, name, begin, values)

    def wait(self, read: Read) -> None:
        """Block until the bytes are there. Raises OSError for a failed transfer, DamagedError for
        wrong bytes."""
        name = self._store.plan.spec.units[read.unit].name
        with self._tracing.waiting("SSD read", name):
            self._engine.wait(read.ticket)
        slot = 0 if read.name == "g" else read.slot
        with self._tracing.waiting("checksum", name):
            self._store.checksums.verify(slot, read.unit, read.name, read.begin, read.values,
                                         lambda element: self._store.where(slot, read.unit, read.name, element))

    def write(self, unit: int, name: str, begin: int, values: torch.Tensor, priority: int,
              slot: int | None = None) -> int:
        """Start writing the version that follows, or the one in ``slot``; returns the ticket."""
        slot = 0 if name == "g" else self._store.slot_to_write(unit) if slot is None else slot
        with self._tracing.waiting("checksum", self._store.plan.spec.units[unit].name):
            self._store.checksums.record(slot, unit, name, begin, values)
        return self._engine.submit_write(self._store.volume_of(unit, name, begin), self._store.offset(slot, unit, name, begin),
                                         values.data_ptr(), paged_bytes(values), priority)
