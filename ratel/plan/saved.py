"""What forward keeps for backward, block inputs (checkpoints) and inner activations, and the slots that it passes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ratel.units import MIB

INPUT = ""
"""The name of a block's input among what is kept of the block."""

WINDOW_INPUTS = 4
"""Inputs of a block that one window holds: the widest results inside usual blocks are 2.7 to 4 times as wide."""
LEAST_BYTES = MIB
"""Smaller ones are not worth a copy: 1 MiB crosses PCIe in 20 us, which launching it takes as well."""
LEAST_SHARE = 64
"""Of a block's input: nor is less than this part of it, where that is smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """One tensor (an inner activation: the tensors of one result) of every micro-batch."""

    block: int
    name: str
    tier: str
    num_bytes: int
    """Of a full micro-batch."""

    @property
    def is_inner(self) -> bool:
        return self.name != INPUT


@dataclass(frozen=True, kw_only=True, slots=True)
class Spill:
    """That what autograd saves in the second run of a block goes to DRAM while it is made, and comes back in backward."""

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


def slot_counts(saved: Iterable[Saved], depth: int) -> dict[int, int]:
    """Slots by their size. What one block keeps of one micro-batch is needed at once: there is room for ``depth`` times
    the most that a block keeps of each size."""
    most: Counter[int] = Counter()
    for (_, num_bytes), count in Counter((s.block, s.num_bytes) for s in saved).items():
        most[num_bytes] = max(most[num_bytes], count * depth)
    return dict(most)


def largest_group(saved: Iterable[Saved]) -> int:
    """Bytes of what one block keeps of one micro-batch, for the block that keeps most."""
    by_block: Counter[int] = Counter()
    for one in saved:
        by_block[one.block] += one.num_bytes
    return max(by_block.values(), default=0)
