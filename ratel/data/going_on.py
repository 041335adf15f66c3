"""Where a run goes on in data that was changed since its state was saved (docs/data.md, "Changed
data")."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ratel.data.batches.order import Permutation
from ratel.data.batches.stream import Position
from ratel.data.sources.documents import DocumentList, find
from ratel.errors import RatelError
from ratel.units import format_count

START_ANEW = "start a new run with --model OUT/model (`ratel export` writes it from a state)"
_WAY_ON = f"Put the data back as it was and resume, or {START_ANEW}"


@dataclass(frozen=True, kw_only=True)
class GoingOn:
    """``held_out``: documents that go on being evaluated on, in their order; ``says``: what was
    done, for the user."""

    position: Position
    held_out: tuple[int, ...]
    says: str


def go_on(before: DocumentList, now: np.ndarray, position: Position, seed: int) -> GoingOn:
    """``position``: in the data as it was; ``now``: the digests of the data as it is.

    What the epoch has learned from, and what waits to be learned from, must be there, at any place.
    The rest of the epoch is what else is there, in an order of its own; what is evaluated on stays
    apart. Raises RatelError otherwise.
    """
    held_out = set(before.held_out)
    order = Permutation(len(before.digests), (seed, position.epoch))
    passed = (set(islice(_numbers(order), position.cursor)) | position.learned) - held_out
    needed = sorted(passed | {number for number, _ in position.waiting})
    asked = np.array([*needed, *before.held_out], dtype=np.int64)
    found = dict(zip(asked.tolist(), find(before.digests[asked], now).tolist()))
    gone = sum(found[number] < 0 for number in needed)
    if gone:
        raise RatelError(f"the data was changed, and {gone:,} of the {format_count(len(needed), 'document')} that this epoch has had "
                         "are not in it any more", field="data", remedy=_WAY_ON)
    kept = tuple(found[number] for number in before.held_out if found[number] >= 0)
    learned = frozenset(found[number] for number in passed)
    going = Position(epoch=position.epoch, waiting=tuple((found[number], start) for number, start in position.waiting), learned=learned)
    return GoingOn(position=going, held_out=kept, says=_say(before, now, len(learned), len(kept)))


def _numbers(order: Permutation) -> Iterable[int]:
    return map(order.__getitem__, range(1 << 62))


def _say(before: DocumentList, now: np.ndarray, learned: int, kept: int) -> str:
    same = int((find(before.digests, now) >= 0).sum())
    left = len(now) - learned - kept
    lost = len(before.held_out) - kept
    evaluation = f"; {format_count(lost, 'document')} of the evaluation are gone" if lost else ""
    return (f"the data was changed: {len(now) - same:,} of its {format_count(len(now), 'document')} are new, "
            f"{len(before.digests) - same:,} of the {len(before.digests):,} before are gone{evaluation}; the {learned:,} that this epoch has "
            f"had are as they were, and the other {left:,} follow in an order of their own")
