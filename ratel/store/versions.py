"""Which of two slots on SSD holds each unit's planes, so that a committed version is never overwritten.

An update reads a unit's current version and writes its successor: the other slot where the current version is a
committed one, else the same. A unit without planes on SSD has versions there only through commits, which copy it.
Without commits there is one slot, and every version is in it.
"""

NEVER = -1


class Versions:
    def __init__(self, on_ssd: list[bool], num_slots: int) -> None:
        self.num_slots = num_slots
        self.current = [0] * len(on_ssd)
        self._on_ssd = on_ssd
        self._committed = [NEVER] * len(on_ssd)
        self._updates = [0] * len(on_ssd)
        self._committed_updates = [NEVER] * len(on_ssd)
        self._included = [NEVER] * len(on_ssd)

    def successor(self, unit: int) -> int:
        """The slot that the unit's next version goes to."""
        current = self.current[unit]
        return 1 - current if self.num_slots == 2 and self._committed[unit] == current else current

    def advance(self, unit: int) -> None:
        """An update is complete: what it wrote is the current version."""
        self._updates[unit] += 1
        if self._on_ssd[unit]:
            self.current[unit] = self.successor(unit)

    def include(self, unit: int) -> bool:
        """The commit in the making takes the unit as it is. Whether that differs from what is committed."""
        self._included[unit] = self._updates[unit]
        changed = self._included[unit] != self._committed_updates[unit]
        if changed and not self._on_ssd[unit]:
            self.current[unit] = self.successor(unit)
        return changed

    def commit(self) -> None:
        """The commit is on disk: every unit's included version is the committed one."""
        self._committed, self._committed_updates = list(self.current), list(self._included)

    def restore(self, slots: list[int]) -> None:
        """Continue from a commit that an earlier run made."""
        self.current, self._committed = list(slots), list(slots)
        self._committed_updates = list(self._updates)
