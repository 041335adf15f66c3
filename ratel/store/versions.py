"""Which of the slots on SSD holds each unit's planes, so that no version that is still needed is
overwritten.

An update reads a unit's current version and writes its successor: another slot where the current
version is a committed one, else the same. An early update, which may be taken back, always writes a
slot that is neither. A unit without planes on SSD has versions there only through commits, which
copy it. With neither commits nor early updates there is one slot, and every version is in it.
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
        return self.spare(unit) if self._committed[unit] == current else current

    def spare(self, unit: int) -> int:
        """A slot that holds neither the unit's current version nor the committed one."""
        taken = (self.current[unit], self._committed[unit])
        return next(slot for slot in range(self.num_slots) if slot not in taken)

    def advance(self, unit: int, slot: int | None = None) -> None:
        """An update is complete: what it wrote, to the successor or to ``slot``, is the current
        version."""
        self._updates[unit] += 1
        if self._on_ssd[unit]:
            self.current[unit] = self.successor(unit) if slot is None else slot

    def include(self, unit: int) -> bool:
        """The commit in the making takes the unit as it is. Whether that differs from what is
        committed."""
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
