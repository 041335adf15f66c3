"""All that a plan has forward keep for backward, and what follows from it: groups, bytes by tier,
slots."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, product
from typing import Any

from ratel.planner.activation_policy import Kept
from ratel.planner.block_profile import BlockProfile
from ratel.planner.checkpoints import INPUT, Group, Saved, groups_of
from ratel.planner.placement import GPU, SSD
from ratel.planner.slot_layout import PAGE_BYTES
from ratel.units import align_up


@dataclass(frozen=True, eq=False)
class Keeping:
    """Plans that differ in other things share one (`keeping`). Bytes are those of one
    micro-batch."""

    saved: tuple[Saved, ...]
    """What is kept, in the order in which forward makes it."""

    @cached_property
    def by_block(self) -> dict[int, tuple[Saved, ...]]:
        return {block: tuple(group) for block, group in groupby(self.saved, key=lambda saved: saved.block)}

    @cached_property
    def groups_by_block(self) -> dict[int, tuple[Group, ...]]:
        return {block: groups for block, saved in self.by_block.items() if (groups := groups_of(saved))}

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        return tuple(group for groups in self.groups_by_block.values() for group in groups)

    def num_bytes(self, tier: str, *, inner: bool) -> int:
        """Bytes that one micro-batch keeps in a tier, outside the GPU in whole pages."""
        return self._num_bytes[tier, inner]

    @cached_property
    def _num_bytes(self) -> Counter[tuple[str, bool]]:
        found: Counter[tuple[str, bool]] = Counter()
        for saved in self.saved:
            if saved.tier == GPU:
                found[GPU, saved.is_inner] += saved.num_bytes
        for group in self.groups:
            found[group.tier, group.is_inner] += align_up(group.num_bytes, PAGE_BYTES)
        return found

    def slots(self, depth: int, *, inner: bool, on_ssd: bool) -> tuple[int, int]:
        """The slots for what leaves the GPU, or of that for what is on SSD: how many, and the bytes
        of each. What one block keeps of one micro-batch is needed at once: there is room for
        ``depth`` times the most that a block has."""
        most, num_bytes = self._slots[inner, on_ssd]
        return depth * most, num_bytes

    @cached_property
    def _slots(self) -> dict[tuple[bool, bool], tuple[int, int]]:
        found = {}
        for inner, on_ssd in product((False, True), repeat=2):
            groups = [group for group in self.groups if group.is_inner == inner and (group.tier == SSD or not on_ssd)]
            most = max(Counter(group.block for group in groups).values(), default=0)
            found[inner, on_ssd] = most, max((group.num_bytes for group in groups), default=0)
        return found

    @cached_property
    def largest_inner_of_a_block(self) -> int:
        """Bytes of inner activations that leave the GPU, of one micro-batch, for the block with
        most of them."""
        by_block: Counter[int] = Counter()
        for group in self.groups:
            if group.is_inner:
                by_block[group.block] += group.num_bytes
        return max(by_block.values(), default=0)


class _Same:
    """A thing as a key: equal to itself alone, so that comparing takes no time, and alive as long
    as the key is."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __hash__(self) -> int:
        return id(self.thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing


def keeping(checkpoint_tiers: tuple[str, ...], kept: Kept, profiles: tuple[BlockProfile, ...], hidden_bytes: int,
            micro_rows: int) -> Keeping:
    """Block inputs of ``hidden_bytes`` and inner activations of ``micro_rows`` rows. A search makes
    thousands of plans that keep the same: what is asked for again with the same objects is the same
    object."""
    return _keeping(_Same(checkpoint_tiers), _Same(kept), _Same(profiles), hidden_bytes, micro_rows)


@lru_cache(maxsize=256)
def _keeping(checkpoint_tiers: _Same, kept: _Same, profiles: _Same, hidden_bytes: int, micro_rows: int) -> Keeping:
    found = []
    for block, tier in enumerate(checkpoint_tiers.thing):
        found.append(Saved(block=block, name=INPUT, tier=tier, num_bytes=hidden_bytes))
        row_bytes = {inner.name: inner.row_bytes for inner in profiles.thing[block].inner} if profiles.thing else {}
        found += [Saved(block=block, name=name, tier=kept_tier, num_bytes=row_bytes[name] * micro_rows)
                  for name, kept_tier in (kept.thing[block] if kept.thing else ())]
    return Keeping(tuple(found))
