"""How states are stored: one table of planes, for all who count their bytes, move them, save them
or update them.

A unit has two segments, what is trained and what is frozen; a row of the table says which of them a
plane is of, how its numbers are stored, and which passes of a step read and write it. Code that
turns numbers into bytes and back is found under the names in the table: an encoding's in
`ratel.store.planes.DTYPES`, an update's in `ratel.runtime.updates.arithmetic`.
"""

from dataclasses import dataclass, field
from functools import cached_property
from math import lcm

from ratel.planner.shape import UnitSpec

PAGE_BYTES = 4096

TRAINED, FROZEN = "trained", "frozen"
FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """Numbers as bits. Where ``block`` elements share a scale, its ``scale_bytes`` lie with
    them."""

    name: str
    bits: int
    block: int = 1
    scale_bytes: int = 0

    def num_bytes(self, num_elements: int) -> int:
        scales = -(-num_elements // self.block) * self.scale_bytes if self.scale_bytes else 0
        return num_elements * self.bits // 8 + scales

    def place(self, num_elements: int) -> int:
        """Where in memory the element of that number is: numbers of their own dtype, or bytes where
        scales lie among them."""
        return num_elements if self.block == 1 else self.num_bytes(num_elements)

    def count(self, length: int) -> int:
        """The inverse, for whole blocks."""
        return length if self.block == 1 else length // self.num_bytes(self.block) * self.block

    @property
    def page_elements(self) -> int:
        """The fewest elements, whole blocks, that fill whole pages of 4096 bytes."""
        block_bytes = self.num_bytes(self.block)
        return self.block * (lcm(block_bytes, PAGE_BYTES) // block_bytes)


MOMENT_BLOCK = 128
"""Elements of a block of 8-bit moments: parameters begin at multiples of it, so that none shares a
block with another."""

BF16, INT16, FP32 = (Encoding(name=name, bits=bits) for name, bits in (("bf16", 16), ("int16", 16), ("fp32", 32)))
MOMENT8, ROOT8 = (Encoding(name=name, bits=8, block=MOMENT_BLOCK, scale_bytes=4)
                  for name in ("int8 in blocks", "uint8 roots in blocks"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneFormat:
    """One row: a plane, how it is stored, which segments of a unit have it, and the passes that
    read and write it."""

    plane: str
    encoding: Encoding
    segments: tuple[str, ...]
    read: tuple[str, ...]
    written: tuple[str, ...]


def _rows(lower_half_computes: bool, compute: Encoding, moments: tuple[Encoding, Encoding]) -> tuple[PlaneFormat, ...]:
    both, passes = (TRAINED, FROZEN), (FORWARD, BACKWARD, UPDATE)

    def row(plane: str, encoding: Encoding, segments: tuple[str, ...] = (TRAINED,), read: tuple[str, ...] = (UPDATE,),
            written: tuple[str, ...] = (UPDATE,)) -> PlaneFormat:
        return PlaneFormat(plane=plane, encoding=encoding, segments=segments, read=read, written=written)

    return (row("hi", BF16, both, passes),
            row("lo", INT16, both, passes) if lower_half_computes else row("lo", INT16),
            row("m", moments[0]), row("v", moments[1]),
            row("g", compute, written=(BACKWARD,)))


@dataclass(frozen=True, kw_only=True)
class StateFormats:
    """The rows of one run. ``compute`` is what blocks compute in, and their gradients come in."""

    name: str
    compute: Encoding
    rows: tuple[PlaneFormat, ...] = field(repr=False)
    update: str
    """The name of the code that updates these planes."""
    update_speed: float = 1.0
    """How many parameters of these the CPU updates in the time that it takes for one of exact
    ones, as measured with 16 cores (h200_adam_states)."""

    @cached_property
    def planes(self) -> tuple[str, ...]:
        """Those that stay from step to step: all but the gradient."""
        return tuple(row.plane for row in self.rows if UPDATE in row.written)

    @cached_property
    def gathered(self) -> tuple[str, ...]:
        """Planes that make the compute copy: the upper half alone, or both halves of the master."""
        return tuple(row.plane for row in self.rows if FORWARD in row.read)

    @property
    def merges(self) -> bool:
        """The compute copy is put together where it computes."""
        return len(self.gathered) > 1

    @cached_property
    def _by_plane(self) -> dict[str, PlaneFormat]:
        return {row.plane: row for row in self.rows}

    def encoding(self, plane: str) -> Encoding:
        return self._by_plane[plane].encoding

    def of(self, unit: UnitSpec) -> "StateFormats":
        """Units that compute in fp32 among others in bf16 have the table of an fp32 run."""
        return FORMATS[self.name][FP32.name] if unit.fp32 and not self.merges else self

    def num_elements(self, unit: UnitSpec, plane: str, segments: tuple[str, ...] = (TRAINED, FROZEN)) -> int:
        """Elements of the unit's plane, in all segments or in some."""
        has = self.of(unit)._by_plane[plane].segments
        trained = unit.num_trainable if TRAINED in has and TRAINED in segments else 0
        return trained + (unit.num_elements - unit.num_trainable if FROZEN in has and FROZEN in segments else 0)

    def num_bytes(self, unit: UnitSpec, plane: str, segments: tuple[str, ...] = (TRAINED, FROZEN)) -> int:
        return self.of(unit).encoding(plane).num_bytes(self.num_elements(unit, plane, segments))

    def changing_bytes(self, unit: UnitSpec, plane: str) -> int:
        """Bytes of what updates write: the trained segment. It has versions, and is what a save
        copies."""
        return self.num_bytes(unit, plane, (TRAINED,))

    @cached_property
    def page_elements(self) -> int:
        """What is moved to and from SSDs begins at multiples of it."""
        return lcm(*(row.encoding.page_elements for row in self.rows))

    @cached_property
    def trained_bytes(self) -> float:
        """Bytes of one trained parameter, its gradient included."""
        return sum(_per_element(row.encoding) for row in self.rows)

    @cached_property
    def update_bytes(self) -> float:
        """That an update of one parameter reads and writes."""
        return sum(_per_element(row.encoding) * ((UPDATE in row.read) + (UPDATE in row.written)) for row in self.rows)


def _per_element(encoding: Encoding) -> float:
    count = 8 * encoding.block  # whole bytes and whole blocks
    size = encoding.num_bytes(count) / count
    return int(size) if size == int(size) else size


def _tables(name: str, moments: tuple[Encoding, Encoding], update: str, update_speed: float = 1.0) -> dict[str, StateFormats]:
    """By what blocks compute in."""
    return {compute.name: StateFormats(name=name, compute=compute, rows=_rows(compute is FP32, compute, moments), update=update,
                                       update_speed=update_speed) for compute in (BF16, FP32)}


EXACT_NAME = "exact"
EXACT = _tables(EXACT_NAME, (FP32, FP32), "adamw")
"""By what blocks compute in: the fp32 master in halves, and moments in fp32."""

FORMATS = {EXACT_NAME: EXACT, "bf16": _tables("bf16", (BF16, BF16), "adamw with rounded moments", 1.30),
           "8bit": _tables("8bit", (MOMENT8, ROOT8), "adamw with rounded moments", 1.34)}
"""By the name that states have them under, and that ``--states`` takes."""

PLANES = EXACT["bf16"].planes
"""Kinds of planes that a unit may have, in the order in which slots and saved states hold them."""
EXACT_UPDATE_BYTES, EXACT_TRAINED_BYTES = EXACT["bf16"].update_bytes, EXACT["bf16"].trained_bytes
"""26 and 14. By the first the rate of the CPU optimizer is measured."""
