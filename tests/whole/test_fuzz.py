"""Mutated files of every kind that is read: each refused in one line or harmless, none a traceback,
a hang or a write elsewhere.

200 cases, always the same; `fuzz_run.py` makes as many others as are asked for.
"""

import json
from pathlib import Path

import pytest

from tests.support.tools import run_tool
from tests.tools import fuzz_run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]
CASES = 200


def test_mutated_files_are_refused_or_harmless(tmp_path: Path) -> None:
    done = run_tool("fuzz_run", tmp_path / "fuzz", "--seed", 0, "--cases", CASES, limit_s=1400)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and not found["failures"], found["failures"]
    assert sum(found["ends"].values()) == CASES
    assert found["ends"]["status 0"] > 20 and found["ends"]["status 2"] > 80  # both answers were heard


@pytest.mark.parametrize("said,status,problem", [
    ("Traceback (most recent call last):\n  x\nValueError: y\n", 1, "traceback"), ("", -9, "ended by SIGKILL"), ("oops\n", 2, "status 2 without"),
    ("ratel: model: x\n", 2, None), ("", 0, None), ("ratel: x\n", 99, "status 99")])
def test_the_judge_sees_what_is_wrong(said: str, status: int, problem: str | None) -> None:
    found = fuzz_run._problem(status, said)
    assert found is problem is None or problem in found


def test_a_write_elsewhere_is_seen(tmp_path: Path) -> None:
    fuzz = fuzz_run.Fuzz.__new__(fuzz_run.Fuzz)
    fuzz._root = tmp_path / "root"
    fuzz._sandbox = fuzz._root / "sandbox"
    (fuzz._sandbox / "out").mkdir(parents=True)
    before = fuzz._snapshot()
    (fuzz._sandbox / "out" / "new").write_text("x")
    assert fuzz._changes(before, []) is None
    (fuzz._sandbox / "x").write_text("x")
    assert "x" in fuzz._changes(before, [])
