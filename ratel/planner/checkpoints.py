"""What forward keeps for backward, block inputs (checkpoints) and inner activations, and the slots
that it passes."""

from collections.abc import Iterable
from dataclasses import dataclass

from ratel.planner.placement import GPU
from ratel.units import MIB, align_up

INPUT = ""
"""The name of a block's input among what is kept of the block."""

PART_ALIGN = 256
"""Bytes. Where each tensor begins in a buffer of several; kernels choose their path by
alignment."""

WINDOW_INPUTS = 4
"""Inputs of a block that one window holds: the widest results inside usual blocks are 2.7 to 4
times as wide."""
LEAST_BYTES = MIB
"""Smaller ones are not worth a copy: 1 MiB crosses PCIe in 20 us, which launching it takes as
well."""
LEAST_SHARE = 64
"""Nor is a result worth a copy that has fewer bytes than one in so many of a block's input, where
that is fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """One tensor (an inner activation: the tensors of one result) of every micro-batch."""

    block: int
    name: str
    tier: str
    num_bytes: int
    """Bytes that it has in a full micro-batch."""

    @property
    def is_inner(self) -> bool:
        return self.name != INPUT


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """What leaves the GPU and comes back as one: the input of a block, or all of its inner
    activations that go to one tier.

    Each transfer on its way back has slots, events and threads that wait for it; one for all costs
    what one result would.
    """

    block: int
    what: str
    """What the group is: `INPUT`, or the tier that keeps it."""
    tier: str
    members: tuple[Saved, ...]

    @property
    def is_inner(self) -> bool:
        return self.what != INPUT

    @property
    def num_bytes(self) -> int:
        """Bytes of its members in a full micro-batch, one after the other."""
        return sum(align_up(saved.num_bytes, PART_ALIGN) for saved in self.members)


def groups_of(saved: Iterable[Saved]) -> tuple[Group, ...]:
    """The groups of what one block keeps."""
    members: dict[str, list[Saved]] = {}
    for one in saved:
        if one.tier != GPU:
            members.setdefault(one.tier if one.is_inner else INPUT, []).append(one)
    return tuple(Group(block=found[0].block, what=what, tier=found[0].tier, members=tuple(found))
                 for what, found in members.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Spill:
    """A plan to spill: what autograd saves in the second run of a block goes to DRAM while it is
    made, and comes back in backward."""

    region_bytes: int
    """DRAM that one block of one micro-batch fills at most; all use it in turn."""
    window_bytes: int
    """GPU memory for what is on its way out, and as much again for what has come back too early."""
    least_bytes: int
    """Storages of less stay on the GPU."""

    @classmethod
    def of(cls, hidden_bytes: int, region_bytes: int) -> "Spill":
        """``hidden_bytes``: of a block's input for one micro-batch."""
        return cls(region_bytes=region_bytes, window_bytes=WINDOW_INPUTS * hidden_bytes,
                   least_bytes=min(LEAST_BYTES, hidden_bytes // LEAST_SHARE))
