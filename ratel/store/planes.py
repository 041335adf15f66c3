"""Where every plane of every unit is, as the plan placed it: a GPU tensor, a DRAM tensor or a range
of the volume."""

from dataclasses import dataclass, replace

import torch

from ratel import native
from ratel.memory.arena import Arena
from ratel.planner.formats import Encoding
from ratel.planner.placement import DRAM, GPU, SSD
from ratel.planner.plan import Plan
from ratel.planner.slot_layout import PAGE_BYTES
from ratel.store.checksums import Checksums
from ratel.store.encodings import DTYPES
from ratel.store.versions import Versions
from ratel.units import align_up


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane of one unit. ``tensor`` on GPU and DRAM tiers; on SSD `Store.offset` says where."""

    name: str
    tier: str
    num_elements: int
    encoding: Encoding
    tensor: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.encoding.name]

    @property
    def num_bytes(self) -> int:
        return self.encoding.num_bytes(self.num_elements)

    def part(self, begin: int, end: int, of: torch.Tensor | None = None) -> torch.Tensor:
        """Elements of the plane's tensor, or of another that holds the same plane."""
        return (self.tensor if of is None else of)[self.encoding.place(begin) : self.encoding.place(end)]


class Store:
    """All planes, by unit index and name. A plane without elements (of a frozen unit) is left out.

    A plane of a unit that is updated early has a second place in DRAM, which becomes the plane when
    the update is kept. On SSD a plane lies at a fixed place of a slot, and `versions` says which
    slot is current; `checksums` holds what its bytes must add up to. Gradients that wait on SSD
    have a volume of their own.
    """

    def __init__(self, plan: Plan, arena: Arena, device: torch.device, volume: "native.nvme_ds.Volume | None",
                 frozen_volume: "native.nvme_ds.Volume | None", grad_volume: "native.nvme_ds.Volume | None", pool: "native.op_ds.Pool", *, checksums: bool = True) -> None:
        self.plan, self.device = plan, device
        self.volume, self.frozen_volume, self.grad_volume = volume, frozen_volume, grad_volume
        self.grad_dtype = DTYPES[plan.formats.compute.name]
        self.versions = Versions([plan.has_states_on_ssd(u) for u in plan.spec.units], plan.num_slots)
        self.checksums = Checksums(plan.spec, pool, grain=plan.grain, num_slots=plan.num_slots, enabled=checksums)
        self._arena, self._layout, self._frozen = arena, plan.slot_layout, plan.frozen_layout
        self._grads_end = 0
        self._grad_offsets: dict[int, int] = {}
        self._planes: list[dict[str, Plane]] = [self._place(unit) for unit in plan.spec.units]
        self._seconds = {unit: self._second_places(unit) for unit in plan.early}
        for unit, name in {**self._layout.places, **self._frozen.places}:
            whole = (unit, name) in self._frozen.places
            place = self.plane(unit, name) if whole else self._layout.places[unit, name]
            self.checksums.add(unit, name, place.num_elements, self.plane(unit, name).encoding)

    def plane(self, unit: int, name: str) -> Plane:
        return self._planes[unit][name]

    def has(self, unit: int, name: str) -> bool:
        return name in self._planes[unit]

    def second(self, unit: int, name: str) -> torch.Tensor | None:
        """Where an early update writes the plane; None for one that is not in DRAM."""
        plane = self._seconds[unit].get(name)
        return plane and plane.tensor

    def keep_second(self, unit: int) -> None:
        """What an early update has written is the unit's state from now on."""
        for name, plane in self._seconds[unit].items():
            self._seconds[unit][name], self._planes[unit][name] = self._planes[unit][name], plane

    def complete_seconds(self) -> None:
        """Frozen parts, which no update writes, are in both places."""
        for unit, planes in self._seconds.items():
            trained = self.plan.spec.units[unit].num_trainable
            for name, plane in planes.items():
                if plane.num_elements > trained:
                    plane.tensor[trained:].copy_(self._planes[unit][name].tensor[trained:])

    def slot_to_read(self, unit: int) -> int:
        return self.versions.current[unit]

    def slot_to_write(self, unit: int) -> int:
        return self.versions.successor(unit)

    def volume_of(self, unit: int, name: str, begin: int = 0) -> "native.nvme_ds.Volume":
        """The volume with element ``begin`` of a plane."""
        if name == "g":
            return self.grad_volume
        return self.frozen_volume if self._is_frozen(unit, begin) else self.volume

    def offset(self, slot: int, unit: int, name: str, begin: int = 0) -> int:
        """Where element ``begin`` of a plane lies in its volume, in bytes."""
        if name == "g":
            return self._grad_offsets[unit] + begin * self._planes[unit][name].dtype.itemsize
        if self._is_frozen(unit, begin):
            return self._frozen.places[unit, name].at(begin - self.plan.spec.units[unit].num_trainable)
        return slot * self._layout.num_bytes + self._layout.places[unit, name].at(begin)

    def _is_frozen(self, unit: int, begin: int) -> bool:
        return begin >= self.plan.spec.units[unit].num_trainable

    def where(self, slot: int, unit: int, name: str, begin: int) -> tuple[str, int]:
        """File and position in it of element ``begin`` of a plane."""
        return self.volume_of(unit, name, begin).locate(self.offset(slot, unit, name, begin))

    def _place(self, unit) -> dict[str, Plane]:
        place, formats = self.plan.placement(unit), self.plan.formats.of(unit)
        names = (*formats.planes, "g") if self.plan.deferred or place.on_gpu else formats.planes
        planes = {}
        for name in names:
            encoding, count = formats.encoding(name), formats.num_elements(unit, name)
            if count:
                planes[name] = Plane(name, place.tier(name), count, encoding, self._reserve(place.tier(name), encoding, count))
                if name == "g" and place.g == SSD:
                    self._grad_offsets[unit.index] = self._grads_end
                    self._grads_end += align_up(planes[name].num_bytes, PAGE_BYTES)
                    self.checksums.add(unit.index, "g", count)
        return planes

    def _second_places(self, unit: int) -> dict[str, Plane]:
        places = {}
        for name in self.plan.second_planes(self.plan.spec.units[unit]):
            if self.has(unit, name):
                plane = self.plane(unit, name)
                places[name] = replace(plane, tensor=self._reserve(DRAM, plane.encoding, plane.num_elements))
        return places

    def _reserve(self, tier: str, encoding: Encoding, count: int) -> torch.Tensor | None:
        length, dtype = encoding.place(count), DTYPES[encoding.name]
        if tier == GPU:
            return torch.zeros(length, dtype=dtype, device=self.device)
        return self._arena.take_as(length, dtype) if tier == DRAM else None
