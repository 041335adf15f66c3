"""What the benchmarks that last minutes share: a time budget, and a report that is on disk after
every point."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ratel.hardware.host import describe_host

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def script_command(name: str) -> list[str]:
    """What runs a script of a room (``"harness.systems"``) in a process of its own, with
    `script_path` in its environment."""
    return [sys.executable, "-m", f"benchmarks.{name}"]


def script_path() -> dict[str, str]:
    """The environment in which Python finds this repository's packages from any directory."""
    known = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *([known] if known else [])])}


class Clock:
    """Seconds that are left of a budget."""

    def __init__(self, budget_s: float) -> None:
        self._end_s = time.monotonic() + budget_s

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()


class Report:
    """A JSON file that is whole whenever somebody looks. Points of an earlier call on the same
    machine are kept."""

    def __init__(self, path: str | None, **facts: Any) -> None:
        self._path = Path(path) if path else None
        self.points: list[dict[str, Any]] = []
        if self._path is not None and self._path.exists():
            self.points = json.loads(self._path.read_text(encoding="utf-8"))["points"]
        self._head = {**origin(), "host": describe_host(), **facts}

    def add(self, point: dict[str, Any]) -> None:
        self.points.append(point)
        self.write()

    def write(self, **facts: Any) -> None:
        self._head |= facts
        if self._path is not None:
            beside = self._path.with_name(f"{self._path.name}.part")
            beside.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            os.replace(beside, self._path)

    @property
    def content(self) -> dict[str, Any]:
        return {**self._head, "points": self.points}


def origin() -> dict[str, str | None]:
    """What a result must say for benchmarks/tables to show it: the command that gave it, and the
    commit."""
    return {"command": _command(sys.argv), "commit": commit()}


def _command(argv: list[str]) -> str:
    """The command as it was given, but for where the report goes, which no one else has to know."""
    script = Path(argv[0]).resolve()
    named = script.is_relative_to(ROOT / "benchmarks")
    name = ".".join(script.relative_to(ROOT).with_suffix("").parts) if named else script.stem
    words = ["python", "-m", name, *argv[1:]]
    begin = words.index("--json") if "--json" in words else len(words)
    return " ".join(words[:begin] + words[begin + 2 :])


def commit() -> str | None:
    """The commit of the working tree; where only a copy of it is, what RATEL_COMMIT says."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("RATEL_COMMIT") or done.stdout.strip() or None
