"""DRAM slots for the weights of units that live on SSD: the copy that uploads and updates share.

A slot holds one unit from the first ``acquire`` to the last ``release``; its bytes are the truth
for that unit while it does. Nothing is kept after the last release. Who asks for a unit while it is
held shares the slot and saves a read: by plan, when a deferred update leaves its copy to the next
forward pass; by luck, when a unit is asked for again before its upload or write-back has ended.
``shared_bytes`` counts both, so that traffic can be accounted for exactly.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ratel import native
from ratel.errors import DamagedError
from ratel.memory import jitter
from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange
from ratel.planner.plan import Plan
from ratel.planner.slot_layout import segments
from ratel.store.plane_io import PlaneIO, Read
from ratel.store.planes import Store


@dataclass(slots=True, eq=False)
class HostSlot:
    buffer: torch.Tensor
    unit: int = -1
    refs: int = 0
    reads: list[Read] = field(default_factory=list)
    reading: threading.Lock = field(default_factory=threading.Lock)


class HostCache:
    """Reference-counted slots, by weight class."""

    def __init__(self, plan: Plan, store: Store, arena: Arena, io: PlaneIO, exchange: Exchange) -> None:
        self._plan, self._store, self._io, self._exchange = plan, store, io, exchange
        self._freed = exchange.condition()
        self._by_unit: dict[int, HostSlot] = {}
        self._unread: set[int] = set()
        self._left: dict[int, HostSlot] = {}
        """By unit, what the gather for backward left to an update."""
        self._kept: dict[int, HostSlot] = {}
        """By unit, what an update left to the next forward pass."""
        self._keeps = False
        self.shared_bytes = 0
        self._held_by = "DRAM slot" if plan.deferred else "update slot"
        """What a trace says of a wait: in eager mode most slots hold weights that are yet to be
        updated."""
        self._free: dict[str, list[HostSlot]] = {}
        for cls in (found.name for found in plan.spec.slot_classes):
            size = plan.host_weight_slot_bytes(cls)
            self._free[cls] = [HostSlot(arena.take(size)) for _ in range(plan.host_weight_slot_count(cls))]

    def acquire(self, unit: int, refs: int = 1) -> HostSlot:
        """The slot that holds the unit, read from SSD if no slot does; blocks while all slots are
        in use."""
        with self._exchange.lock:
            self._exchange.wait_for(self._freed, lambda: self._available(unit) > 0, self._held_by,
                                    self._plan.spec.units[unit].name)
            self._unread.discard(unit)
            self._freed.notify_all()
            return self._take(unit, refs)

    def acquire_ahead(self, unit: int) -> HostSlot:
        """As ``acquire``, for an update whose result stays in the slot until the next forward pass
        reads it.

        Leaves one slot to units that the pass reads before without an update (see
        ``expect_forward``): it would wait for a slot, and the slots for the pass to get past those
        units.
        """
        with self._exchange.lock:
            self._exchange.wait_for(self._freed, lambda: self._available(unit) > self._reads_before(unit), "DRAM slot",
                                    self._plan.spec.units[unit].name)
            return self._take(unit, 1)

    def expect_forward(self, unread: Iterable[int]) -> None:
        """A forward pass is to come: updates keep their results for it, and it reads the units
        ``unread`` from SSD, in their order, besides those that are updated."""
        with self._exchange.lock:
            self._keeps, self._unread = True, set(unread)
            self._freed.notify_all()

    def expect_no_forward(self) -> None:
        """Nothing is kept for a forward pass that may be far off."""
        with self._exchange.lock:
            self._keeps, self._unread = False, set()
            self._freed.notify_all()
            for unit in list(self._kept):
                self.took_over(unit)

    def leave(self, unit: int, slot: HostSlot) -> None:
        """The gather for backward leaves one hold of its copy to the (eager) update that
        follows."""
        with self._exchange.lock:
            self._left[unit] = slot

    def take_left(self, unit: int) -> HostSlot | None:
        """What was left to the unit's update, which releases it."""
        with self._exchange.lock:
            return self._left.pop(unit, None)

    def keep_for_forward(self, slot: HostSlot) -> None:
        """One more hold, on an updated copy, until the next forward pass takes it over, if one is
        expected."""
        with self._exchange.lock:
            if self._keeps:
                slot.refs += 1
                self._kept[slot.unit] = slot

    def took_over(self, unit: int) -> None:
        """The updated copy kept for the next forward pass has another holder now."""
        with self._exchange.lock:
            slot = self._kept.pop(unit, None)
        if slot is not None:
            self.release(slot)

    def _class(self, unit: int) -> str:
        return self._plan.spec.classes[unit].name

    def _available(self, unit: int) -> int:
        return len(self._free[self._class(unit)]) + (unit in self._by_unit)

    def _reads_before(self, unit: int) -> bool:
        cls = self._class(unit)
        return any(u < unit and self._class(u) == cls for u in self._unread)

    def _take(self, unit: int, refs: int) -> HostSlot:
        slot = self._by_unit.get(unit)
        if slot is None:
            slot = self._by_unit[unit] = self._free[self._class(unit)].pop(0)
            slot.unit = unit
            slot.reads = [self._io.read(unit, name, begin, view[begin:end], native.nvme_ds.WEIGHT)
                          for name, view in self.views(slot).items()
                          for begin, end in segments(self._plan.spec.units[unit], view.numel())]
        else:
            self.shared_bytes += self._plan.host_weight_bytes(self._plan.spec.units[unit])
        slot.refs += refs
        return slot

    def ready(self, slot: HostSlot) -> None:
        """Block until the slot's bytes have come from SSD."""
        with slot.reading:
            try:
                while slot.reads:
                    self._io.wait(slot.reads[0])
                    slot.reads.pop(0)
            except (OSError, DamagedError) as error:
                # Said before another thread finds the read gone, whose error would tell the user
                # nothing.
                self._exchange.fail(error, f"reading {self._plan.spec.units[slot.unit].name}")
                raise
        jitter.pause()

    def release(self, slot: HostSlot) -> None:
        with self._exchange.lock:
            slot.refs -= 1
            assert slot.refs >= 0, "a weight slot was released more often than acquired"
            if slot.refs == 0:
                if self._by_unit.get(slot.unit) is slot:
                    del self._by_unit[slot.unit]
                self._free[self._class(slot.unit)].append(slot)
                self._freed.notify_all()

    def withdraw(self, slot: HostSlot) -> None:
        """It is to hold a version that may be forgotten: who asks for the unit from now on reads it
        from SSD."""
        with self._exchange.lock:
            del self._by_unit[slot.unit]

    def views(self, slot: HostSlot) -> dict[str, torch.Tensor]:
        """The planes inside the slot, by name."""
        views, cursor = {}, 0
        for name in self._plan.weights_from_ssd(self._plan.spec.units[slot.unit]):
            plane = self._store.plane(slot.unit, name)
            views[name] = slot.buffer[cursor : cursor + plane.num_bytes].view(plane.dtype)
            cursor += plane.num_bytes
        return views
