"""SIGKILL at any instant loses no state that was durable, and the resumed run ends with the same bits."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
TESTS = Path(__file__).resolve().parent
SEED, KILLS = 3, 30


@pytest.mark.timeout(300)
def test_runs_that_are_killed_again_and_again_end_as_if_they_had_not_been(tmp_path: Path, ssd_dir: Path) -> None:
    """Everything is checked where it happens (kill_run.py); here, that the kills were of all kinds."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run([sys.executable, TESTS / "kill_run.py", ssd_dir, str(SEED), str(KILLS), "--json",
                           tmp_path / "summary.json"], text=True, capture_output=True, timeout=290,
                          env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert found["kills"] == KILLS and found["durable_steps_lost"] == 0 and found["resumed_starts"] >= KILLS // 3
    assert set(found["by_mode"]) == {f"{durable}, {optimizer}" for durable in ("checkpoint", "step")
                                     for optimizer in ("deferred", "eager")}, found
    stages = Counter(found["by_stage"])
    assert stages["while a state was being saved"] >= 5 and len(stages) == 3, found
    assert len(found["by_where"]) >= 5 and len(found["by_place"]) >= 4, found
