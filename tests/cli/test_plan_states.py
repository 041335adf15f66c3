"""`ratel plan` and the formats that states may have: what each would take, and what would fit in
another."""

import json

import pytest

import ratel
from ratel import cli
from ratel.planner.formats import FORMATS
from ratel.planner.report.state_choices import EFFECTS
from ratel.runtime.planning.planner import PlanResult

pytestmark = pytest.mark.unit
TASK = dict(hardware="4090", batch_size=8, seq_len=256, dtype="bf16", gpu_memory="1GiB", dram="2.75GiB", ssds=2)


@pytest.fixture(scope="module")
def planned() -> dict[str, PlanResult]:
    return {states: ratel.plan("llama-160m", states=states, **TASK) for states in FORMATS}


def test_each_format_is_planned_as_if_it_had_been_asked_for(planned: dict) -> None:
    params = planned["exact"].plan.spec.num_params
    for states, found in planned.items():
        choices = {choice["states"]: choice for choice in found.to_json()["states"]}
        assert list(choices) == list(FORMATS) == list(EFFECTS) and found.plan.formats.name == states
        assert {name: choice["param_bytes"] for name, choice in choices.items()} == {"exact": 12, "bf16": 8, "8bit": 6.0625}
        for name, choice in choices.items():
            assert choice["step_s"] == pytest.approx(planned[name].prediction.step_s, rel=1e-9)
            assert choice["state_bytes"] == planned[name].plan.state_bytes
            assert choice["state_bytes"] == pytest.approx(choice["param_bytes"] * params, rel=0.01)
        assert choices["8bit"]["step_s"] < choices["bf16"]["step_s"] < choices["exact"]["step_s"]
        text = found.describe()
        assert f"{states} (planned)" in text and all(f"{name}: {effect}" in text for name, effect in EFFECTS.items())


def test_the_question_is_left_out_where_no_advice_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "llama-160m", "--hardware", "4090", "--batch-size", "8", "--seq-len", "256", "--no-advice"]
    assert cli.main(arguments) == 0
    assert "bf16 (planned)" not in capsys.readouterr().out and cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["states"] == []


def test_what_does_not_fit_may_fit_in_another_format(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "llama-3b", "--hardware", "4090", "--ssds", "0", "--batch-size", "2", "--seq-len", "256",
                 "--dtype", "bf16", "--gpu-memory", "4GiB", "--no-advice"]
    assert cli.main([*arguments, "--dram", "32GiB"]) == 2
    assert "it would fit with --states bf16 or 8bit" in capsys.readouterr().err
    assert cli.main([*arguments, "--dram", "32GiB", "--states", "bf16"]) == 0
    assert cli.main([*arguments, "--dram", "16GiB"]) == 2
    assert "--states" not in capsys.readouterr().err
    found = ratel.plan("llama-3b", hardware="4090", ssds=0, batch_size=2, seq_len=256, dtype="bf16", gpu_memory="4GiB",
                       dram="32GiB", states="bf16")
    exact = found.to_json()["states"][0]
    assert exact["states"] == "exact" and exact["step_s"] is None and "short by" in exact["problem"]
    assert "does not fit" in found.describe()
