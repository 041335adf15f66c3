"""The shape of a model as the planner and the runtime see it: parameters laid out in units, units
used by stages.

Pure data. A unit is one flat vector of elements; every plane of the unit (`hi`, `lo`, `m`, `v`,
`g`) has the same layout, so that a chunk ``[a, b)`` of elements means the same parameters in each
plane.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from math import prod

from ratel.units import align_up

PARAM_ALIGN = 128
"""Elements. A bf16 view then starts at a multiple of 256 bytes, which every GEMM kernel accepts."""

UNIT_ALIGN = 2048
"""Elements. A bf16 plane is then a multiple of 4 KiB, the block of O_DIRECT."""

FP32_SUFFIX = ".fp32"
"""How the name of a unit ends that holds what a stage computes in fp32 among others in bf16."""

ADDED_SUFFIX = ".adapters"
"""How the name of a unit ends that holds what a session has put into a stage beside the model's own
parameters. It computes in fp32, too."""


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter. ``aliases`` are its other names in the module (tied weights), ``offset`` its
    first element."""

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    decay: bool = True
    aliases: tuple[str, ...] = ()
    offset: int = 0

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def end(self) -> int:
        return self.offset + self.num_elements


@dataclass(frozen=True, kw_only=True)
class UnitSpec:
    """Parameters gathered, used and released together, in one flat layout.

    ``[0, num_decay)`` is trained with weight decay, ``[num_decay, num_trainable)`` without,
    ``[num_trainable, num_elements)`` is frozen (it has `hi` only). All three are in elements,
    padding included; padding holds zeros.
    """

    index: int
    name: str
    kind: str
    """``pre``, ``block``, ``post`` or ``shared``."""
    params: tuple[ParamSpec, ...]
    num_decay: int
    num_trainable: int
    num_elements: int
    fp32: bool = False
    """Whether the unit's compute copy and its gradient are fp32, whatever the others' are: both
    halves of the master are needed where it computes. Such units are small, and their states are on
    the GPU."""

    @property
    def num_params(self) -> int:
        return sum(p.num_elements for p in self.params)

    @property
    def num_trainable_params(self) -> int:
        return sum(p.num_elements for p in self.params if p.trainable)


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """A part of the forward pass that runs between gathers: before the blocks, one block, after the
    blocks."""

    index: int
    name: str
    kind: str
    """``pre``, ``block`` or ``post``."""
    units: tuple[int, ...]
    """Indices of the units whose parameters it uses."""


@dataclass(frozen=True, slots=True)
class SlotClass:
    """Units that take turns in the same slots, on the GPU and in DRAM. No stage uses two units of
    one class that move."""

    name: str
    is_deep: bool
    """One unit follows another, through as many slots as there are buffers. Else there is one
    slot."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Units by index, and stages in forward order."""

    name: str
    units: tuple[UnitSpec, ...]
    stages: tuple[StageSpec, ...]
    hidden_size: int | None = None
    vocab_size: int | None = None
    max_seq_len: int | None = None

    @property
    def num_params(self) -> int:
        return sum(u.num_params for u in self.units)

    @property
    def num_trainable_params(self) -> int:
        return sum(u.num_trainable_params for u in self.units)

    @cached_property
    def classes(self) -> tuple[SlotClass, ...]:
        """The slot class of each unit."""
        return _classes_of(self)

    @cached_property
    def slot_classes(self) -> tuple[SlotClass, ...]:
        """Each once: blocks first, then what is before and after them, then what is held all
        step."""
        return tuple(sorted(set(self.classes), key=lambda cls: (_BASES.index(cls.name.split()[0]), cls.name)))

    def class_named(self, name: str) -> SlotClass | None:
        return next((cls for cls in self.slot_classes if cls.name == name), None)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """A number for each unit that units of one kind and size have in common."""
        numbers: dict[tuple[SlotClass, str, int, int, bool], int] = {}
        return tuple(numbers.setdefault((cls, u.kind, u.num_elements, u.num_trainable, u.fp32), len(numbers))
                     for u, cls in zip(self.units, self.classes))

    @cached_property
    def has_fp32_units(self) -> bool:
        return any(unit.fp32 for unit in self.units)

    @cached_property
    def backward_stages(self) -> tuple[StageSpec, ...]:
        """In the order of backward. What is before the blocks has none where nothing of it is
        trained."""
        trains_first = any(self.units[unit].num_trainable for unit in self.stages[0].units)
        return self.stages[::-1] if trains_first else self.stages[:0:-1]

    @cached_property
    def closing_order(self) -> tuple[UnitSpec, ...]:
        """Trained units in the order in which their gradients become complete."""
        closing = closing_units(self)
        return tuple(unit for stage in reversed(self.stages) for unit in closing[stage.index])


def outside_blocks(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the classes of what is before and after the blocks."""
    return tuple(cls.name for cls in spec.slot_classes if not cls.is_deep)


_BASES = ("block", "ends", "shared")


def _classes_of(spec: ModelSpec) -> tuple[SlotClass, ...]:
    """Where a stage uses several units of one kind, the second gets a class of its own. Units that
    compute in fp32 among others stay on the GPU, and need none."""
    stages: dict[int, list[int]] = {}
    for stage in spec.stages:
        for unit in stage.units:
            stages.setdefault(unit, []).append(stage.index)
    taken: set[tuple[int, str]] = set()
    classes = []
    for unit in spec.units:
        base, used = unit.kind if unit.kind in _BASES else "ends", stages.get(unit.index, [])
        names = (f"{base} {number}" if number > 1 else base for number in count(1))
        name = base if unit.fp32 else next(name for name in names if not any((stage, name) in taken for stage in used))
        if not unit.fp32:
            taken.update((stage, name) for stage in used)
        classes.append(SlotClass(name, is_deep=base == "block"))
    return tuple(classes)


def closing_stages(spec: ModelSpec) -> dict[int, int]:
    """The first stage that uses each unit: the last one in backward order, after which its
    gradient is complete."""
    closing: dict[int, int] = {}
    for stage in spec.stages:
        for unit in stage.units:
            closing.setdefault(unit, stage.index)
    return closing


def closing_units(spec: ModelSpec) -> dict[int, list[UnitSpec]]:
    """For each stage the trained units whose gradients are complete when its backward pass is."""
    closing = closing_stages(spec)
    return {stage.index: [unit for unit in map(spec.units.__getitem__, stage.units)
                          if unit.num_trainable and closing[unit.index] == stage.index] for stage in spec.stages}


def forward_order(units: Iterable[UnitSpec]) -> list[UnitSpec]:
    """The units as forward needs them: what several stages share comes first."""
    return sorted(units, key=lambda unit: (unit.kind != "shared", unit.index))


def lay_out(index: int, name: str, kind: str, params: Iterable[ParamSpec], *, fp32: bool = False) -> UnitSpec:
    """Order parameters (decayed, not decayed, frozen), give each its offset, and close the unit."""
    params = list(params)
    groups = (
        [p for p in params if p.trainable and p.decay],
        [p for p in params if p.trainable and not p.decay],
        [p for p in params if not p.trainable],
    )
    placed: list[ParamSpec] = []
    ends: list[int] = []
    cursor = 0
    for group in groups:
        for param in group:
            placed.append(replace(param, offset=cursor))
            cursor = align_up(cursor + param.num_elements, PARAM_ALIGN)
        ends.append(cursor)
    num_trainable = align_up(ends[1], UNIT_ALIGN) if groups[2] or ends[1] else 0
    if groups[2]:
        # Frozen parameters start on a unit boundary of their own, so that a trainable plane is a
        # whole prefix.
        shift = num_trainable - ends[1]
        first = len(groups[0]) + len(groups[1])
        placed[first:] = [replace(p, offset=p.offset + shift) for p in placed[first:]]
        ends[2] += shift
    return UnitSpec(index=index, name=name, kind=kind, params=tuple(placed), num_decay=ends[0],
                    num_trainable=num_trainable, num_elements=max(align_up(ends[2], UNIT_ALIGN), num_trainable), fp32=fp32)
