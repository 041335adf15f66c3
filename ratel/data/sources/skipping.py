"""Lines that are passed over because they are not as documented (``--skip-bad-lines``): counted,
and remembered for a list."""

import logging
import threading
from typing import Any

from ratel.data.sources.records import RecordError

log = logging.getLogger(__name__)
LISTED = 10_000
"""The most lines that are listed; more are counted only."""
_TOLD = 5


class SkippedLines:
    """The lines that were skipped in all files of a run, each once. Any thread may note one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[tuple[str, int], dict[str, Any]] = {}
        self._places: set[tuple[str, int]] = set()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, file: str, offset: int, error: RecordError, line: int | None = None) -> None:
        """``offset``: of the line's first byte; ``line``: its number, where that is known."""
        place = file, offset
        with self._lock:
            if place in self._places:
                return
            self._places.add(place)
            if len(self._found) < LISTED:
                self._found[place] = {"file": file, **({"line": line} if line else {"byte": offset}), "why": str(error)}
            number = len(self._places)
        if number <= _TOLD:
            where = f"line {line}" if line else f"the line at byte {offset:,}"
            log.warning("%s, %s is skipped: %s%s", file, where, error, "; more are listed in OUT/skipped.json" if number == _TOLD else "")

    def to_json(self) -> dict[str, Any]:
        with self._lock:
            return {"skipped": len(self._places), "lines": sorted(self._found.values(), key=lambda entry: (entry["file"], entry.get("line", 0),
                                                                                                         entry.get("byte", 0)))}
