"""The experiment on formats of states: its runs differ in the format alone, and its report can be
read."""

import json
from pathlib import Path

import pytest

from benchmarks.exactness import states
from ratel.planner.formats import FORMATS

pytestmark = pytest.mark.e2e
TINY = {**states.SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_formats_start_alike_and_part_by_rounding(tmp_path: Path) -> None:
    path = tmp_path / "states.json"
    arguments = ["--model", json.dumps(TINY), "--device", "cpu", "--dtype", "fp32", "--steps", "6", "--eval-every", "3", "--rows", "2",
                 "--seq-len", "32", "--seeds", "0", "1", "--json", str(path)]
    states.main(arguments)
    report = json.loads(path.read_text())
    runs = {(point["states"], point["seed"]): point for point in report["points"]}
    assert set(runs) == {(name, seed) for name in FORMATS for seed in (0, 1)}
    for seed in (0, 1):
        exact, short = runs["exact", seed], runs["bf16", seed]
        assert exact["losses"][:2] == short["losses"][:2] and exact["losses"][-1] != short["losses"][-1]
        assert [step for step, _ in exact["eval_losses"]] == [3, 6]
        assert abs(exact["eval_losses"][-1][1] - short["eval_losses"][-1][1]) < 0.01
    found = report["summary"]
    assert found["exact"]["above_exact"] == [0, 0] and found["spread_of_exact"] > 0
    assert found["bf16"]["mean_above_exact"] == pytest.approx(found["bf16"]["mean"] - found["exact"]["mean"])
    states.main(arguments)  # what is there is not trained again
    assert json.loads(path.read_text())["points"] == report["points"]
