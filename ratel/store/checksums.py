"""A checksum for every grain of every plane on SSD, made before it is written and compared after it
is read.

Drives, cables and firmware do return wrong bytes without an error. A wrong weight would be trained
on, and every state saved afterwards would have it.
"""

from collections.abc import Callable

import numpy as np
import torch

from ratel import native
from ratel.errors import DamagedError
from ratel.planner.formats import FP32, Encoding
from ratel.planner.shape import ModelSpec
from ratel.planner.slot_layout import first_element, first_grain, num_grains, segments

Key = tuple[int, str]


class Checksums:
    """CRC-32 by slot, unit and plane, in DRAM: 4 bytes for 0.5 to 1 MiB.

    ``grain`` is in elements. Switched off (``enabled`` False), nothing is computed and nothing
    compared.
    """

    def __init__(self, spec: ModelSpec, pool: "native.op_ds.Pool", *, grain: int, num_slots: int, enabled: bool) -> None:
        self._spec, self._pool, self.grain, self.enabled = spec, pool, grain, enabled
        self._tables: list[dict[Key, np.ndarray]] = [{} for _ in range(num_slots)]
        self._elements: dict[Key, int] = {}
        self._encodings: dict[Key, Encoding] = {}

    def add(self, unit: int, name: str, num_elements: int, encoding: Encoding = FP32) -> None:
        """A plane that will be on SSD. ``encoding`` matters where elements lie in blocks."""
        self._elements[unit, name], self._encodings[unit, name] = num_elements, encoding
        count = num_grains(self._spec.units[unit], num_elements, self.grain)
        for table in self._tables:
            table[unit, name] = np.zeros(count, dtype=np.uint32)

    def record(self, slot: int, unit: int, name: str, begin: int, values: torch.Tensor) -> None:
        """``values`` (CPU, contiguous) are about to be written at element ``begin`` of the
        plane."""
        if self.enabled:
            self._grains(slot, unit, name, begin, values)[:] = self.compute(unit, begin, values, self._encodings[unit, name])

    def record_zeros(self, unit: int, name: str, dtype: torch.dtype) -> None:
        """The plane reads as zeros, in every slot."""
        if not self.enabled:
            return
        sizes = [min(self.grain, end - at) for begin, end in segments(self._spec.units[unit], self._elements[unit, name])
                 for at in range(begin, end, self.grain)]
        place = self._encodings[unit, name].place
        sums = {size: self._pool.crc32(zeros.data_ptr(), zeros.nbytes, zeros.nbytes)[0]
                for size in set(sizes) for zeros in [torch.zeros(place(size), dtype=dtype)]}
        for table in self._tables:
            table[unit, name][:] = [sums[size] for size in sizes]

    def restore(self, slot: int, unit: int, name: str, sums: np.ndarray) -> None:
        """Take over the sums of a plane's trained part, which an earlier run wrote."""
        self._tables[slot][unit, name][: len(sums)] = sums

    def verify(self, slot: int, unit: int, name: str, begin: int, values: torch.Tensor,
               where: Callable[[int], tuple[str, int]]) -> None:
        """``values`` were read from element ``begin`` on. Raises DamagedError naming file, unit,
        plane and chunk; ``where`` gives file and position of an element."""
        if not self.enabled:
            return
        expected = self._grains(slot, unit, name, begin, values)
        found = self.compute(unit, begin, values, self._encodings[unit, name])
        wrong = np.flatnonzero(expected != found)
        if wrong.size:
            index, spec = int(wrong[0]), self._spec.units[unit]
            chunk = first_grain(spec, begin, self.grain) + index
            path, position = where(first_element(spec, chunk, self.grain))
            raise DamagedError(f"is damaged at byte {position}: unit {spec.name}, plane {name}, chunk {chunk} has checksum "
                               f"{int(found[index]):08x}, {int(expected[index]):08x} was written", path=path)

    def compute(self, unit: int, begin: int, values: torch.Tensor, encoding: Encoding = FP32) -> np.ndarray:
        """uint32, one for each grain of ``values``, which start at element ``begin`` of a plane of
        the unit."""
        item, place, count = values.element_size(), encoding.place, encoding.count(values.numel())
        split = min(max(self._spec.units[unit].num_trainable - begin, 0), count)
        parts = [self._pool.crc32(values.data_ptr() + place(at) * item, (place(end) - place(at)) * item, place(self.grain) * item)
                 for at, end in ((0, split), (split, count)) if at < end]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def trained(self, slot: int, unit: int, name: str) -> np.ndarray:
        """The sums of a plane's trained part."""
        trained = min(self._spec.units[unit].num_trainable, self._elements[unit, name])
        return self._tables[slot][unit, name][: num_grains(self._spec.units[unit], trained, self.grain)]

    def _grains(self, slot: int, unit: int, name: str, begin: int, values: torch.Tensor) -> np.ndarray:
        """Their part of the table. What is frozen has one place, and its sums are with slot 0."""
        spec = self._spec.units[unit]
        slot = 0 if begin >= spec.num_trainable else slot
        first, end = first_grain(spec, begin, self.grain), begin + self._encodings[unit, name].count(values.numel())
        past = num_grains(spec, end, self.grain)
        return self._tables[slot][unit, name][first:past]
