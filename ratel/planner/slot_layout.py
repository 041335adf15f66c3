"""Where each plane lies within a slot on SSD, and the grains of it that carry a checksum.

One layout serves the files that training works on and the files of a saved state.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import gcd

from ratel.planner.formats import TRAINED, Encoding, StateFormats
from ratel.planner.shape import ModelSpec, UnitSpec
from ratel.units import align_up

PAGE_BYTES = 4096
GRAIN_ELEMENTS = 1 << 18
"""Elements under one checksum: 0.5 or 1 MiB. Small enough to spread over cores, large enough that
the table is nothing."""
PIECE_ELEMENTS = 1 << 20
"""Elements that a save moves at once: 2 or 4 MiB, from where on drives give their full rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanePlace:
    """One plane in a slot: ``offset`` in bytes."""

    offset: int
    num_elements: int
    encoding: Encoding

    @property
    def num_bytes(self) -> int:
        return self.encoding.num_bytes(self.num_elements)

    def at(self, begin: int) -> int:
        """Where element ``begin`` lies in the slot."""
        return self.offset + self.encoding.num_bytes(begin)


@dataclass(frozen=True, kw_only=True)
class SlotLayout:
    """By unit index and plane name; a plane without elements is left out."""

    places: dict[tuple[int, str], PlanePlace] = field(repr=False)
    num_bytes: int


def lay_out_slot(spec: ModelSpec, planes_of: Callable[[UnitSpec], Iterable[str]], formats: StateFormats,
                 segment: str = TRAINED) -> SlotLayout:
    """Units in order, one segment of their planes after the other, each at a multiple of 4096
    bytes."""
    places: dict[tuple[int, str], PlanePlace] = {}
    cursor = 0
    for unit in spec.units:
        for name in planes_of(unit):
            count = formats.num_elements(unit, name, (segment,))
            if count:
                encoding = formats.of(unit).encoding(name)
                place = places[unit.index, name] = PlanePlace(offset=cursor, num_elements=count, encoding=encoding)
                cursor += align_up(place.num_bytes, PAGE_BYTES)
    return SlotLayout(places=places, num_bytes=cursor)


def grain_of(chunk_elements: int) -> int:
    """The largest grain of which the optimizer's chunks are whole multiples."""
    return gcd(chunk_elements, GRAIN_ELEMENTS)


def segments(unit: UnitSpec, num_elements: int) -> list[tuple[int, int]]:
    """The trained and the frozen part of a plane. Grains never cross from one into the other: an
    update writes the first only."""
    split = min(unit.num_trainable, num_elements)
    return [(begin, end) for begin, end in ((0, split), (split, num_elements)) if begin < end]


def num_grains(unit: UnitSpec, num_elements: int, grain: int) -> int:
    return sum(-(-(end - begin) // grain) for begin, end in segments(unit, num_elements))


def first_grain(unit: UnitSpec, begin: int, grain: int) -> int:
    """Index of the grain that starts at element ``begin``."""
    if begin < unit.num_trainable or not unit.num_trainable:
        assert begin % grain == 0, f"no grain of {grain} starts at element {begin}"
        return begin // grain
    assert (begin - unit.num_trainable) % grain == 0, f"no grain of {grain} starts at element {begin}"
    return -(-unit.num_trainable // grain) + (begin - unit.num_trainable) // grain


def first_element(unit: UnitSpec, index: int, grain: int) -> int:
    """Where the grain of that index starts."""
    trained = -(-unit.num_trainable // grain)
    return index * grain if index < trained or not trained else unit.num_trainable + (index - trained) * grain


def pieces(unit: UnitSpec, num_elements: int, piece: int) -> list[tuple[int, int]]:
    """Ranges of at most ``piece`` elements (a multiple of the grain), none across the two
    segments."""
    return [(begin, min(begin + piece, end)) for start, end in segments(unit, num_elements)
            for begin in range(start, end, piece)]
