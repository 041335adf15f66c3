"""SIGKILL at any instant loses no state that was durable, and the resumed run ends with the same
bits."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.tools import run_tool

pytestmark = pytest.mark.e2e
SEED, KILLS, MOVED_KILLS = 3, 30, 10


def ran(script: str, directory: Path, kills: int, summary: Path) -> dict[str, Any]:
    """Everything is checked where it happens; what is returned says what there was to check."""
    done = run_tool(script, directory, SEED, kills, "--json", summary, limit_s=290)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(summary.read_text())["results"]
    assert found["kills"] == kills and found["durable_steps_lost"] == 0 and found["resumed_starts"] >= kills // 3
    return found


@pytest.mark.timeout(300)
def test_runs_that_are_killed_again_and_again_end_as_if_they_had_not_been(tmp_path: Path, ssd_dir: Path) -> None:
    """Here, that the kills were of all kinds."""
    found = ran("kill_run", ssd_dir, KILLS, tmp_path / "summary.json")
    assert set(found["by_mode"]) == {f"{durable}, {optimizer}" for durable in ("checkpoint", "step")
                                     for optimizer in ("deferred", "eager")}, found
    stages = Counter(found["by_stage"])
    assert stages["while a state was being saved"] and len(stages) == 3, found
    assert len(found["by_where"]) >= 5 and len(found["by_place"]) >= 4, found


@pytest.mark.timeout(300)
def test_copies_and_moves_between_kills_lose_nothing(tmp_path: Path, ssd_dir: Path) -> None:
    """And that there were copies, renamed runs and renamed drives."""
    found = ran("move_run", ssd_dir, MOVED_KILLS, tmp_path / "summary.json")
    assert len(found["by_displacement"]) >= 4 and sum(found["by_displacement"].values()) > MOVED_KILLS, found
