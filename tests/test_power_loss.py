"""What was said to be written is there after a power failure, the exported model included (power_run.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import patience

pytestmark = pytest.mark.e2e
TESTS = Path(__file__).resolve().parent
SEED, FAILURES = 4, 8
DISKS_OF_ONE = 4


@pytest.mark.timeout(300)
def test_nothing_is_lost_that_was_said_to_be_written(tmp_path: Path, ssd_dir: Path) -> None:
    """Before that, that the simulation sees what is not synced (`Failing.check_itself`)."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run([sys.executable, TESTS / "power_run.py", ssd_dir, str(SEED), str(FAILURES), "--json", tmp_path / "json"],
                          text=True, capture_output=True, timeout=patience(290), env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "json").read_text())["results"]
    assert found["disks"] == DISKS_OF_ONE * FAILURES and len(found["by_disk"]) == DISKS_OF_ONE
    assert len(found["by_moment"]) >= 3 and found["by_moment"]["the"] >= 1, found  # the end of a whole run among them
