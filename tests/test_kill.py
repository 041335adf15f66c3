"""SIGKILL at any instant loses no more than the step in the making: the resumed run ends with the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ratel.runtime.state import SavedState
from resume_common import assert_same_run

pytestmark = pytest.mark.e2e
TESTS = Path(__file__).resolve().parent
SEED, KILLS = 3, 9


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Half of the kills come from outside after a random time, half from the run's own file operations."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run([sys.executable, TESTS / "kill_run.py", tmp_path, str(SEED), str(KILLS)], text=True,
                          capture_output=True, timeout=110, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert all(kill["killed"] or kill["status"] == 0 for kill in kills), kills
    assert sum(kill["killed"] for kill in kills) >= KILLS - 2, kills
    assert sum(is_mid_save(kill["left"]) for kill in kills) >= 3, f"too few hit a save: {kills}"
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    assert [path.name for path in (tmp_path / "out" / "state").iterdir()] == ["step-00000020"]
    assert SavedState(tmp_path / "out" / "state" / "step-00000020").verify() > 0
    assert list((tmp_path / "ssd").iterdir()) == []


def is_mid_save(left: list[str]) -> bool:
    """One state is kept: another beside it, or a part of one, shows that the kill came while one was made or removed."""
    return len(left) > 1
