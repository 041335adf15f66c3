"""Gathers the compute copy of a unit: `hi` as it is for bf16, `hi` and `lo` merged for fp32."""

import torch

from ratel.memory.exchange import Exchange
from ratel.memory.lanes import Lanes
from ratel.memory.slots import Slot, SlotPool
from ratel.planner.plan import Plan
from ratel.planner.schedule import Gather
from ratel.runtime.updates.ledger import Ledger
from ratel.store.host_cache import HostCache, HostSlot
from ratel.store.encodings import DTYPES
from ratel.store.planes import Store


class WeightSource:
    """Weights from DRAM planes and SSD slots into GPU slots, never before the unit's pending update
    is done."""

    def __init__(self, plan: Plan, store: Store, cache: HostCache, exchange: Exchange, lanes: Lanes,
                 ledger: Ledger) -> None:
        self._plan, self._store, self._cache, self._lanes, self._ledger = plan, store, cache, lanes, ledger
        self._dtype = DTYPES[plan.formats.compute.name]
        self._pools = {cls: self._make_pool(cls, exchange) for cls in (found.name for found in plan.spec.slot_classes)}
        self._staging = self._make_staging()

    def pool(self, gather: Gather) -> SlotPool:
        return self._pools[self._plan.spec.classes[gather.unit].name]

    def name(self, gather: Gather) -> str:
        return self._plan.spec.units[gather.unit].name

    def open(self, gather: Gather) -> HostSlot | None:
        self._ledger.wait_updated(gather.unit)
        if not self._plan.weights_from_ssd(self._plan.spec.units[gather.unit]):
            return None
        slot = self._cache.acquire(gather.unit, refs=2 if gather.keep_for_update else 1)
        if gather.keep_for_update:
            self._cache.leave(gather.unit, slot)
        self._cache.took_over(gather.unit)
        return slot

    def fill(self, gather: Gather, handle: HostSlot | None, slot: Slot) -> torch.Tensor:
        planes = self.host_planes(gather.unit, handle)
        view = slot.buffer[: self._plan.spec.units[gather.unit].num_elements]
        if handle is not None:
            self._cache.ready(handle)
        with self._lanes.work("h2d", self.name(gather), view.numel() * view.element_size()):
            if self._plan.formats.merges:
                merge(planes["hi"], planes["lo"], view, self._staging)
            else:
                view.copy_(planes["hi"], non_blocking=True)
        return view

    def done(self, gather: Gather, handle: HostSlot | None) -> None:
        if handle is not None:
            self._cache.release(handle)

    def host_planes(self, unit: int, handle: HostSlot | None) -> dict[str, torch.Tensor]:
        """The unit's weight planes in DRAM: resident ones, and those in the slot."""
        planes = {p: self._store.plane(unit, p).tensor for p in self._plan.formats.gathered}
        if handle is not None:
            planes.update(self._cache.views(handle))
        return planes

    def resident(self, unit: int) -> torch.Tensor:
        """The compute copy of a unit whose planes are on the GPU; merged for every use in fp32."""
        hi = self._store.plane(unit, "hi").tensor
        if not self._plan.formats.of(self._plan.spec.units[unit]).merges:
            return hi
        merged = torch.empty(hi.numel(), dtype=torch.float32, device=hi.device)
        merge(hi, self._store.plane(unit, "lo").tensor, merged, None)
        return merged

    def _make_pool(self, cls: str, exchange: Exchange) -> SlotPool:
        num_elements = self._plan.max_bytes(cls, "weights") // self._plan.weight_bytes
        count = self._plan.weight_slot_count(cls)
        return SlotPool(exchange, [torch.zeros(num_elements, dtype=self._dtype, device=self._lanes.device)
                                   for _ in range(count)])

    def _make_staging(self) -> "tuple[torch.Tensor, torch.Tensor] | None":
        if not (self._plan.formats.merges and self._lanes.is_cuda):
            return None
        num_elements = max(u.num_elements for u in self._plan.spec.units)
        return (torch.empty(num_elements, dtype=torch.int16, device=self._lanes.device),
                torch.empty(num_elements, dtype=torch.int16, device=self._lanes.device))


def merge(hi: torch.Tensor, lo: torch.Tensor, out: torch.Tensor,
          staging: "tuple[torch.Tensor, torch.Tensor] | None") -> None:
    """``out`` (fp32) = the master whose halves are ``hi`` (bf16) and ``lo`` (int16): ``bits = (hi
    << 16) + lo``.

    Across PCIe the halves go through ``staging`` first, so that the copies are plain ones.
    """
    hi, bits = hi.view(torch.int16), out.view(torch.int32)
    if staging is not None:
        halves = staging[0][: hi.numel()], staging[1][: hi.numel()]
        halves[0].copy_(hi, non_blocking=True)
        halves[1].copy_(lo, non_blocking=True)
        hi, lo = halves
    bits.copy_(hi)
    bits.bitwise_left_shift_(16)
    bits.add_(lo)
