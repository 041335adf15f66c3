"""What forward keeps for backward, block inputs (checkpoints) and inner activations, and the slots that it passes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

INPUT = ""
"""The name of a block's input among what is kept of the block."""


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
