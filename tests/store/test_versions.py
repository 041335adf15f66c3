"""Which slot an update writes: against a record of what each slot holds, whatever the order of
updates and commits."""

import random

import pytest

from ratel.store.versions import NEVER, Versions

pytestmark = pytest.mark.unit


class Slots:
    """One unit on SSD. What is in its slots, and which of that may still be asked for."""

    def __init__(self, num_slots: int) -> None:
        self.versions = Versions([True], num_slots)
        self.held: list[int | None] = [0] * num_slots
        self.update = self.included = 0
        self.committed: tuple[int, int] | None = None
        self.including: tuple[int, int] | None = None

    def check(self) -> None:
        assert self.held[self.versions.current[0]] == self.update
        if self.committed is not None:
            slot, update = self.committed
            assert self.held[slot] == update, "a committed version was overwritten"

    def update_once(self, slot: int | None = None) -> None:
        target = self.versions.successor(0) if slot is None else slot
        self.update += 1
        self.held[target] = self.update
        self.versions.advance(0, slot)

    def commit(self) -> bool:
        changed = self.versions.include(0)
        including = (self.versions.current[0], self.update)
        self.versions.commit()
        self.committed = including
        return changed


@pytest.mark.parametrize("seed", range(8))
def test_no_version_that_is_needed_is_overwritten(seed: int) -> None:
    r, slots = random.Random(seed), Slots(3)
    updates_since, has_commit = 0, False
    for _ in range(60):
        what = r.choice(["update", "update", "early", "forgotten", "commit"])
        if what == "commit":
            assert slots.commit() == (updates_since > 0 or not has_commit)
            updates_since, has_commit = 0, True
        elif what == "forgotten":  # an early update that is taken back: its slot holds what nobody asks for
            spare = slots.versions.spare(0)
            assert spare != slots.versions.current[0] and (slots.committed is None or spare != slots.committed[0])
            slots.held[spare] = None
        else:
            slots.update_once(slots.versions.spare(0) if what == "early" else None)
            updates_since += 1
        slots.check()


def test_without_commits_every_version_is_in_one_slot() -> None:
    versions = Versions([True, True], 1)
    for _ in range(3):
        versions.advance(1)
    assert versions.current == [0, 0] and versions.successor(1) == 0


def test_a_commit_holds_the_slot_that_it_named() -> None:
    versions = Versions([True], 2)
    versions.advance(0)
    assert versions.current == [0]
    assert versions.include(0)
    versions.commit()
    assert versions.successor(0) == 1 and not versions.include(0)
    versions.advance(0)
    assert versions.current == [1] and versions.successor(0) == 1
    assert versions.include(0)
    versions.commit()
    assert versions.successor(0) == 0


def test_a_unit_that_lives_elsewhere_has_a_new_version_where_a_commit_copies_it() -> None:
    versions = Versions([False], 2)
    assert versions.include(0) and versions.current == [0]
    versions.commit()
    assert not versions.include(0) and versions.current == [0]  # nothing has changed: nothing is copied
    versions.advance(0)
    assert versions.current == [0]  # an update writes elsewhere
    assert versions.include(0) and versions.current == [1]
    versions.commit()
    versions.advance(0)
    assert versions.include(0) and versions.current == [0]


def test_what_is_updated_during_a_commit_is_not_in_it() -> None:
    versions = Versions([False], 2)
    versions.include(0)
    versions.advance(0)
    versions.commit()
    assert versions.include(0), "the update came after the commit took the unit"


def test_a_run_goes_on_from_the_slots_of_an_earlier_commit() -> None:
    versions = Versions([True, False], 2)
    slots = [1, 0]
    versions.restore(slots)
    assert versions.current == [1, 0] and versions.successor(0) == 0
    assert not versions.include(0) and not versions.include(1)
    versions.advance(0)
    assert versions.current == [0, 0] and slots == [1, 0]
    assert NEVER not in versions.current
