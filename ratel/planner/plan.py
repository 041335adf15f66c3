"""The frozen result of planning: placement of every plane, checkpoints, buffer counts, and the
bytes they take."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from ratel.planner import memory
from ratel.planner.block_profile import BlockProfile
from ratel.planner.checkpoints import Group, Saved, Spill
from ratel.planner.formats import FROZEN, StateFormats
from ratel.planner.kept_activations import Keeping
from ratel.planner.kept_activations import keeping as keeping_of
from ratel.planner.placement import DRAM, SSD, UnitPlacement, closed_first
from ratel.planner.shape import ModelSpec, UnitSpec
from ratel.planner.slot_layout import PIECE_ELEMENTS, SlotLayout, grain_of, lay_out_slot
from ratel.planner.work import Buffers, Work
from ratel.units import align_up

FEWEST_SAVE_PIECES = 8
"""The fewest buffers that a saver has: a drive is kept busy with some while others are filled."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    spec: ModelSpec = field(repr=False)
    formats: StateFormats
    optimizer: str
    """``eager``, ``deferred`` or ``speculative``."""
    placements: tuple[UnitPlacement, ...] = field(repr=False)
    checkpoint_tiers: tuple[str, ...]
    """By block."""
    work: Work
    profiles: tuple[BlockProfile, ...] = field(default=(), repr=False)
    """By block; blocks of one kind share one. Empty: not known."""
    loss_s: float | None = None
    """Seconds of everything after the blocks, forward and backward, for one full micro-batch, where
    it was measured."""
    kept: tuple[tuple[tuple[str, str], ...], ...] = field(default=(), repr=False)
    """By block: ``(name, tier)`` of each inner activation that is kept until backward. What is
    absent is recomputed."""
    spill: Spill | None = None
    """None: what autograd saves in a block stays on the GPU until its backward has used it."""
    buffers: Buffers = Buffers()
    workspace_bytes: int = 0
    """GPU memory left to PyTorch's allocator for activations inside a stage; measured with the
    windows of `spill`."""
    accumulators: tuple[str, ...] = ()
    """Weight classes whose gradients are sums of several passes, kept in fp32 and rounded once."""
    gpu_budget: int | None = None
    dram_budget: int | None = None
    process_bytes: int = 0
    """Host memory that the process held before anything of the plan was reserved."""
    import_element_bytes: int = 4
    """Bytes beside the arena that importing and exporting take for each element of the largest
    unit."""
    on_host: bool = False
    """The device is the CPU: what is "on the GPU" is ordinary memory and counts against the DRAM
    budget."""
    durable: str = "off"
    """How states survive a crash: ``step`` (two slots on SSD and commits in place), ``checkpoint``
    (copies at explicit saves) or ``off``."""
    early_units: int = 0
    """Speculative: so many of the units that the CPU updates, those whose gradients are complete
    first, are updated before the norm is known, if their gradients stay in DRAM."""
    save_pieces: int = 0
    """Buffers in DRAM through which states pass on their way to a save."""

    @property
    def commits(self) -> bool:
        return self.durable == "step"

    @property
    def num_slots(self) -> int:
        """How many versions of the states an SSD holds: the current one, the committed one, and one
        that may yet be forgotten."""
        return 1 + self.commits + any(self.has_states_on_ssd(self.spec.units[unit]) for unit in self.early)

    @property
    def grain(self) -> int:
        """Elements under one checksum."""
        return grain_of(self.buffers.chunk_elements)

    @property
    def piece_elements(self) -> int:
        """What a save moves at once, in whole grains."""
        largest = max((u.num_elements for u in self.spec.units), default=1)
        return self._in_pages(self.grain * max(1, min(PIECE_ELEMENTS, largest) // self.grain))

    @property
    def save_piece_bytes(self) -> int:
        """A piece of the widest plane."""
        return max(self.formats.encoding(p).num_bytes(self.piece_elements) for p in self.formats.planes)

    @cached_property
    def slot_layout(self) -> SlotLayout:
        """The layout of the states' volume: the planes that live there; with commits a place for
        every plane."""
        def planes_of(unit: UnitSpec) -> list[str]:
            return [p for p in self.formats.planes if self.commits or self.placement(unit).tier(p) == SSD]

        return lay_out_slot(self.spec, planes_of, self.formats)

    @cached_property
    def frozen_layout(self) -> SlotLayout:
        """What is frozen of planes on SSD. It has one place, in a volume of its own: no update
        writes it, and no save copies it."""
        return lay_out_slot(self.spec, lambda unit: [p for p in self.formats.planes if self.placement(unit).tier(p) == SSD],
                            self.formats, FROZEN)

    def has_states_on_ssd(self, unit: UnitSpec) -> bool:
        return any(self.placement(unit).tier(p) == SSD and self.formats.changing_bytes(unit, p) for p in self.formats.planes)

    @property
    def copied_bytes(self) -> int:
        """What an update of everything waits for at a save: planes outside the SSDs, whose next
        version has no place of its own."""
        return sum(number * self.formats.changing_bytes(u, p) for u, number in self.alike for p in self.formats.planes
                   if self.placement(u).tier(p) != SSD)

    @property
    def state_bytes(self) -> int:
        return sum(number * self.formats.changing_bytes(u, p) for u, number in self.alike for p in self.formats.planes)

    @property
    def save_bytes(self) -> int:
        """Written at each save: what a commit copies, or everything."""
        return self.copied_bytes if self.commits else self.state_bytes

    @property
    def deferred(self) -> bool:
        """Gradients wait for the norm of all of them, and updates for the next step's forward pass
        (but early ones)."""
        return self.optimizer != "eager"

    @cached_property
    def early(self) -> frozenset[int]:
        """Units that are updated on the guess that nothing will be clipped. Their gradients stay in
        DRAM, for the case that they have to be updated again."""
        first = closed_first(self.spec, self.placements, self.early_units) if self.early_units else []
        return frozenset(unit.index for unit in first if self.placement(unit).g == DRAM)

    @property
    def while_clipped(self) -> "Plan":
        """What is done while gradients are scaled down, as those of the steps before were: no
        update is made early."""
        return replace(self, early_units=0)

    def updates_in_backward(self, unit: UnitSpec) -> bool:
        """Under backward, when its gradient has arrived."""
        return not self.deferred or unit.index in self.early

    def second_planes(self, unit: UnitSpec) -> tuple[str, ...]:
        """Planes in DRAM of which there are two: the current one, and one that an early update
        writes."""
        return tuple(p for p in self.formats.planes if unit.index in self.early and self.placement(unit).tier(p) == DRAM)

    @property
    def grad_bytes(self) -> int:
        return self.weight_bytes

    @property
    def weight_bytes(self) -> int:
        return self.formats.compute.num_bytes(1)

    def placement(self, unit: UnitSpec) -> UnitPlacement:
        return self.placements[unit.index]

    def chunk_of(self, unit: UnitSpec) -> int:
        """What an update handles at once. With nothing on SSD there is nothing to overlap: every
        pause between chunks, in which threads meet, would be lost."""
        from_ssd = self.ring_planes(unit) or self.weights_from_ssd(unit)
        return min(self._in_pages(self.buffers.chunk_elements), unit.num_trainable) if from_ssd else unit.num_trainable

    def _in_pages(self, num_elements: int) -> int:
        """What begins where the one before ends begins at a page, in every plane."""
        return align_up(num_elements, self.formats.page_elements)

    def class_of(self, unit: UnitSpec) -> str:
        return self.spec.classes[unit.index].name

    def _depth_of(self, cls: str, buffers: int) -> int:
        found = self.spec.class_named(cls)
        return buffers if found is not None and found.is_deep else 1

    def streamed(self, cls: str) -> list[UnitSpec]:
        """Units of a class whose weights come to the GPU and go again."""
        return [u for u in self.spec.units if self.class_of(u) == cls and not self.placement(u).on_gpu]

    @cached_property
    def alike(self) -> tuple[tuple[UnitSpec, int], ...]:
        """One of all units of one size that are in the same places and updated at the same time,
        and their number. A search asks thousands of plans for their bytes, and most units of a
        model are equal blocks."""
        first: dict[tuple[int, int, bool], UnitSpec] = {}
        numbers: dict[tuple[int, int, bool], int] = {}
        for unit, size, place in zip(self.spec.units, self.spec.sizes, self.placements):
            key = (size, id(place), unit.index in self.early)
            first.setdefault(key, unit)
            numbers[key] = numbers.get(key, 0) + 1
        return tuple((first[key], number) for key, number in numbers.items())

    def _streamed(self, cls: str) -> list[tuple[UnitSpec, int]]:
        return self._streamed_by_class.get(cls, [])

    @cached_property
    def _streamed_by_class(self) -> dict[str, list[tuple[UnitSpec, int]]]:
        found: dict[str, list[tuple[UnitSpec, int]]] = {}
        for unit, number in self.alike:
            if not self.placement(unit).on_gpu:
                found.setdefault(self.class_of(unit), []).append((unit, number))
        return found

    def weights_from_ssd(self, unit: UnitSpec) -> tuple[str, ...]:
        return tuple(p for p in self.formats.gathered if self.placement(unit).tier(p) == SSD)

    def ring_planes(self, unit: UnitSpec) -> tuple[str, ...]:
        """Planes that the optimizer fetches from SSD chunk by chunk: all on SSD but the weights."""
        place = self.placement(unit)
        planes = [p for p in self.formats.planes if p not in self.formats.gathered and place.tier(p) == SSD]
        if self.deferred and place.g == SSD:
            planes.append("g")
        return tuple(planes)

    def weight_slot_count(self, cls: str) -> int:
        streamed = sum(number for _, number in self._streamed(cls))
        count = min(streamed, self._depth_of(cls, self.buffers.weight_slots))
        if (not self.deferred or self.early) and self.host_weight_slot_count(cls) < self._num_from_ssd(cls):
            # The DRAM copy of a unit stays for its update under backward. A gather beyond these
            # copies would wait for an update whose gradient needs what is gathered after it.
            count = min(count, self.host_weight_slot_count(cls))
        return count

    def host_weight_slot_count(self, cls: str) -> int:
        return min(self._num_from_ssd(cls), self._depth_of(cls, self.buffers.host_weight_slots))

    def _num_from_ssd(self, cls: str) -> int:
        return sum(number for u, number in self._streamed(cls) if self.weights_from_ssd(u))

    def host_weight_slot_bytes(self, cls: str) -> int:
        return max((self.host_weight_bytes(u) for u, _ in self._streamed(cls)), default=0)

    def host_weight_bytes(self, unit: UnitSpec) -> int:
        return sum(self.formats.num_bytes(unit, p) for p in self.weights_from_ssd(unit))

    def grads_pass_through(self, unit: UnitSpec) -> bool:
        """The gradient occupies a DRAM slot for a while, not a plane of its own."""
        place = self.placement(unit)
        return not place.on_gpu and unit.num_trainable > 0 and (not self.deferred or place.g == SSD)

    def host_grad_slot_count(self, cls: str) -> int:
        passing = sum(number for u, number in self._streamed(cls) if self.grads_pass_through(u))
        return min(passing, self._depth_of(cls, self.buffers.host_grad_slots))

    def max_bytes(self, cls: str, of: str) -> int:
        """Largest unit of the class: ``weights``, ``grads`` or ``acc`` (fp32 accumulator)."""
        if of == "acc":
            return max((u.num_trainable * 4 for u, _ in self.alike if self.class_of(u) == cls), default=0)
        return max((u.num_elements * self.weight_bytes if of == "weights" else u.num_trainable * self.grad_bytes
                    for u, _ in self._streamed(cls)), default=0)

    def grad_slot_count(self, cls: str) -> int:
        trained = sum(number for u, number in self._streamed(cls) if u.num_trainable)
        return min(trained, self._depth_of(cls, self.buffers.grad_slots))

    @cached_property
    def keeping(self) -> Keeping:
        """What forward keeps for backward, and in which groups and slots."""
        return keeping_of(self.checkpoint_tiers, self.kept, self.profiles, self.work.hidden_bytes, self.work.micro_rows)

    @property
    def saved(self) -> tuple[Saved, ...]:
        """Everything that forward keeps for backward, in the order in which it makes it."""
        return self.keeping.saved

    def saved_of(self, block: int) -> tuple[Saved, ...]:
        return self.keeping.by_block.get(block, ())

    def groups_of(self, block: int) -> tuple[Group, ...]:
        """What leaves the GPU of what the block keeps."""
        return self.keeping.groups_by_block.get(block, ())

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.keeping.groups

    def return_slots(self, inner: bool) -> tuple[int, int]:
        """GPU slots for what comes back, checkpoints or inner activations: how many, and of how
        many bytes each."""
        return self.keeping.slots(self._depth(inner), inner=inner, on_ssd=False)

    def staging_slots(self, inner: bool) -> tuple[int, int]:
        """DRAM slots for what goes to SSD; there are as many for what comes back."""
        return self.keeping.slots(self._depth(inner), inner=inner, on_ssd=True)

    def _depth(self, inner: bool) -> int:
        return self.buffers.inner_slots if inner else self.buffers.checkpoint_slots

    @cached_property
    def gpu_items(self) -> dict[str, int]:
        """Bytes on the GPU by purpose."""
        return memory.gpu_items(self)

    @cached_property
    def dram_items(self) -> dict[str, int]:
        """Bytes of the arena by purpose, each part rounded to pages as the arena does."""
        return memory.dram_items(self)

    @cached_property
    def ssd_items(self) -> dict[str, int]:
        """Bytes of the volumes by purpose."""
        return memory.ssd_items(self)

    @cached_property
    def ring_slot_bytes(self) -> int:
        return max((memory.ring_bytes(self, u) for u, _ in self.alike), default=0)

    @property
    def norm_bytes(self) -> int:
        return memory.paged(4 * len(self.spec.units))

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu_items.values())

    @property
    def arena_bytes(self) -> int:
        return sum(self.dram_items.values())

    @property
    def dram_bytes(self) -> int:
        return sum(self.host_items.values())

    @cached_property
    def host_items(self) -> dict[str, int]:
        """All bytes of DRAM by purpose: the arena and what is beside it."""
        items = {**self.dram_items, "this process": self.process_bytes, "import of one unit": self.import_bytes}
        if self.on_host:
            items |= {f"device: {name}": num_bytes for name, num_bytes in self.gpu_items.items()}
            # Units are imported before the first activation exists and exported after the last.
            items["import of one unit"] = max(0, self.import_bytes - self.workspace_bytes)
        return items

    @property
    def import_bytes(self) -> int:
        """While weights and moments are imported or exported, one unit at a time."""
        return max((u.num_elements * self.import_element_bytes for u, _ in self.alike), default=0)

    @property
    def ssd_bytes(self) -> int:
        return sum(self.ssd_items.values())
