"""Where every plane of every unit is, as the plan placed it: a GPU tensor, a DRAM tensor or a range of the volume."""

from dataclasses import dataclass

import torch

from ratel import native
from ratel.memory.arena import Arena
from ratel.plan.placement import DRAM, GPU, PLANES, SSD, plane_elements
from ratel.plan.plan import PAGE_BYTES, Plan
from ratel.units import align_up

DTYPES = {"hi": torch.bfloat16, "lo": torch.int16, "m": torch.float32, "v": torch.float32}


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane of one unit. ``tensor`` on GPU and DRAM tiers, ``offset`` (bytes into the volume) on SSD."""

    name: str
    tier: str
    num_elements: int
    dtype: torch.dtype
    tensor: torch.Tensor | None = None
    offset: int = -1

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()


class Store:
    """All planes, by unit index and name. A plane without elements (of a frozen unit) is left out."""

    def __init__(self, plan: Plan, arena: Arena, device: torch.device, volume: "native.nvme_ds.Volume | None") -> None:
        self.plan, self.volume, self.device = plan, volume, device
        self.grad_dtype = torch.float32 if plan.fp32 else torch.bfloat16
        self._arena = arena
        self._cursor = 0
        self._planes: list[dict[str, Plane]] = [self._place(unit) for unit in plan.spec.units]
        assert self._cursor == plan.ssd_items.get("planes", 0), "the volume is laid out for the plan's bytes"

    def plane(self, unit: int, name: str) -> Plane:
        return self._planes[unit][name]

    def has(self, unit: int, name: str) -> bool:
        return name in self._planes[unit]

    def _place(self, unit) -> dict[str, Plane]:
        place = self.plan.placement(unit)
        names = (*PLANES, "g") if self.plan.deferred or place.on_gpu else PLANES
        planes = {}
        for name in names:
            dtype = self.grad_dtype if name == "g" else DTYPES[name]
            count = unit.num_trainable if name == "g" else plane_elements(unit, name, fp32=self.plan.fp32)
            if count:
                planes[name] = self._make(name, place.tier(name), count, dtype)
        return planes

    def _make(self, name: str, tier: str, count: int, dtype: torch.dtype) -> Plane:
        if tier == GPU:
            tensor = torch.zeros(count, dtype=dtype, device=self.device)
        elif tier == DRAM:
            tensor = self._arena.take_as(count, dtype)
        else:
            offset, self._cursor = self._cursor, self._cursor + align_up(count * dtype.itemsize, PAGE_BYTES)
            return Plane(name, SSD, count, dtype, offset=offset)
        return Plane(name, tier, count, dtype, tensor=tensor)
