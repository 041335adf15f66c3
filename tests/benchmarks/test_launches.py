"""`benchmarks/parts/launches.py` runs, and says what each kind of block visit takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import patience

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.e2e
def test_script_writes_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.parts.launches", "--device", "cpu", "--blocks", "2",
               "--micro-batches", "2", "--rounds", "1", "--json", str(tmp_path / "launches.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(180), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "launches.json").read_text())["points"]
    assert [point["name"].partition(":")[0] for point in points] == 3 * ["Hugging Face"] + 4 * ["Ratel"]
    assert all(0 < point["visit_s"] < 1 for point in points)
    assert all(point["name"] in done.stdout for point in points)
