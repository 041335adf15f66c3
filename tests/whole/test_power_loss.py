"""What was said to be written is there after a power failure, the exported model included
(power_run.py)."""

import json
from pathlib import Path

import pytest

from tests.support.tools import run_tool

pytestmark = pytest.mark.e2e
SEED, FAILURES = 4, 8
DISKS_OF_ONE = 4


@pytest.mark.timeout(300)
def test_nothing_is_lost_that_was_said_to_be_written(tmp_path: Path, ssd_dir: Path) -> None:
    """Before that, that the simulation sees what is not synced (`Failing.check_itself`)."""
    done = run_tool("power_run", ssd_dir, SEED, FAILURES, "--json", tmp_path / "json", limit_s=290)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "json").read_text())["results"]
    assert found["disks"] == DISKS_OF_ONE * FAILURES and len(found["by_disk"]) == DISKS_OF_ONE
    assert len(found["by_moment"]) >= 3 and found["by_moment"]["the"] >= 1, found  # the end of a whole run among them
