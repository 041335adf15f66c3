"""The optimizer benchmark: its report is complete, can be written as JSON and be read by people."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from op_ds import bench
from tests.support.patience import patience

pytestmark = pytest.mark.native

ROOT = Path(bench.__file__).parents[1]


@pytest.mark.parametrize("peer", [None, torch])
def test_report(peer: object) -> None:
    report = json.loads(json.dumps(bench.measure(num_params=70_001, num_threads=2, repeats=2, torch=peer)))
    assert report["settings"]["num_threads"] == 2 and report["settings"]["num_params"] == 70_016 - 128
    assert ("torch fused fp32" in report["results"]) == (peer is torch)
    for name, result in report["results"].items():
        assert result["best_elements_per_s"] >= result["elements_per_s"] > 0
        assert result["bandwidth_bps"] == pytest.approx(result["elements_per_s"] * bench.BYTES[name])
    assert max(report["results"][name]["percent_of_bandwidth"] for name in bench.BANDWIDTH_TESTS) == pytest.approx(100)
    assert all(name in bench.describe(report) for name in report["results"])


def test_script_writes_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.parts.adam", "--num-params", "50000", "--num-threads", "1", "2",
               "--repeats", "1", "--isa", "scalar", "--without-torch", "--json", str(tmp_path / "adam.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(60), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    reports = json.loads((tmp_path / "adam.json").read_text())
    assert [r["settings"]["num_threads"] for r in reports] == [1, 2]
    assert all(r["settings"]["isa"] == "scalar" for r in reports) and "of bandwidth" in done.stdout
