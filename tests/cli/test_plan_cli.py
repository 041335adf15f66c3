"""`ratel plan` and `ratel.plan`: the table, the numbers, what would help, wear, the largest that
fits, the picture."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ratel
from ratel import cli
from ratel.config import resolve
from ratel.errors import RatelError
from ratel.planner.forecast.cost import RESOURCES, predict
from ratel.planner.forecast.durability import saving
from ratel.planner.forecast.wear import parse_endurance, wear
from ratel.planner.formats import PLANES
from ratel.planner.machine.hardware import load_hardware
from ratel.planner.machine.pipes import ssd_rates
from ratel.planner.report.report import summed, table
from ratel.planner.search.largest import largest_count, with_depth
from ratel.runtime.planning.machine import machine_for
from tests.support.patience import patience
from tests.support.plans import STATES_ON_SSD, gpt_spec, make_plan

pytestmark = pytest.mark.unit

SMALL = ["--model", "llama-160m", "--hardware", "4090", "--batch-size", "8", "--seq-len", "256", "--dtype", "bf16"]
TIGHT = ["--gpu-memory", "1GiB", "--dram", "2.75GiB"]


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def tight() -> Any:
    """Most states on SSD."""
    return ratel.plan("llama-160m", hardware="4090", ssds=2, batch_size=8, seq_len=256, dtype="bf16", gpu_memory="1GiB",
                      dram="2.75GiB", ssd_space="2TB", endurance="1000TBW")


def test_the_numbers_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output_of(capsys, *SMALL, *TIGHT, "--ssds", "2", "--json"))
    assert found["fits"] and found["tokens_per_s"] == pytest.approx(8 * 256 / found["step_s"])
    for tier, memory in found["memory"].items():
        assert memory["used"] == sum(memory["by_purpose"].values())
        assert memory["allowed"] is None or memory["used"] <= memory["allowed"], tier
    assert found["memory"]["SSD"]["allowed"] is None and any("SSD space" in note for note in found["notes"])
    assert set(found["busy_s"]) == set(RESOURCES)
    assert found["bound_s"] == max(found["busy_s"].values()) == found["busy_s"][found["bound_by"]]
    assert found["wear"]["step_bytes"] == found["plan"]["step_traffic_bytes"]["ssd_written"]
    assert len(found["hardware"]["ssds"]) == 2


def test_the_table_says_what_people_ask(capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(capsys, *SMALL, *TIGHT, "--ssds", "1")
    for words in ("llama-160m fits on RTX 4090", "tokens/s", "bound by: ", "memory", "workspace", "SSD wear: ", "in a day of",
                  "what would help most:", "states last by explicit copies only", "note: SSD space: no limit"):
        assert words in text, words
    assert max(map(len, text.splitlines())) <= 130


def test_it_says_what_a_clipped_step_takes(capsys: pytest.CaptureFixture[str]) -> None:
    early = (*SMALL, "--optimizer", "speculative")
    assert "while gradients are clipped, " in output_of(capsys, *early)
    assert "while gradients are clipped" not in output_of(capsys, *SMALL, "--optimizer", "deferred")
    found = json.loads(output_of(capsys, *early, "--json"))
    assert found["clipped_step_s"] >= found["step_s"]


def test_what_does_not_fit_is_refused_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", *SMALL, "--ssds", "0", "--gpu-memory", "400MiB", "--dram", "3GiB", "--json"]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["fits"] is False and found["short"] in ("dram", "gpu_memory") and "short by" in found["problem"]
    assert err.count("\n") == 1 and "short by" in err and "batch" in err


def test_python_and_command_line_say_the_same(tight: Any, capsys: pytest.CaptureFixture[str]) -> None:
    printed = output_of(capsys, *SMALL, *TIGHT, "--ssds", "2", "--ssd-space", "2TB", "--endurance", "1000TBW")
    assert printed == tight.describe() + "\n"
    assert tight.prediction == predict(tight.plan, tight.report.hardware)


def test_gains_are_those_of_planning_again(tight: Any) -> None:
    gains = {gain.what: gain for gain in tight.report.gains}
    assert [g.gained for g in tight.report.gains] == sorted((g.gained for g in gains.values()), reverse=True)
    assert "64 GiB more DRAM" in gains, gains  # everything fits then
    assert all(gain.gained == pytest.approx(gain.tokens_per_s - tight.prediction.tokens_per_s) for gain in gains.values())
    plain = ratel.plan("llama-160m", hardware="4090", ssds=2, batch_size=8, seq_len=256, dtype="bf16", gpu_memory="1GiB",
                       dram="66.75GiB", advice=False)
    assert plain.prediction.tokens_per_s >= gains["64 GiB more DRAM"].tokens_per_s * (1 - 1e-9)
    assert plain.report.gains is None


def test_wear_by_hand(tight: Any) -> None:
    plan, prediction = tight.plan, tight.prediction
    worn = wear(plan, replace(prediction, ssd_written=10**9, step_s=2.0), weights=(1, 1), capacities=[2 * 10**12] * 2,
                endurance_bytes=1e15)
    assert worn.day_bytes == 43200e9 and worn.drive_writes_per_day == pytest.approx(10.8)
    assert worn.years == pytest.approx(2e15 / 43200e9 / 365.25)
    uneven = wear(plan, replace(prediction, ssd_written=10**9, step_s=2.0), weights=(3, 1), capacities=[2 * 10**12] * 2,
                  endurance_bytes=1e15)
    assert uneven.drive_writes_per_day == pytest.approx(1.5 * 10.8)  # of the first, which has three quarters
    assert uneven.years == pytest.approx(worn.years / 1.5)
    unknown = wear(plan, prediction, weights=(1,))
    assert unknown.drive_writes_per_day is None and unknown.years is None and unknown.step_bytes > 0
    commits = wear(replace(plan, durable="step"), prediction, weights=(1,), save_every=10)
    assert commits.step_bytes == prediction.ssd_written + replace(plan, durable="step").save_bytes // 10


@pytest.mark.parametrize(("text", "num_bytes"), [("3500TBW", 3.5e15), ("3.5PBW", 3.5e15), ("600 tb", 6e14)])
def test_endurance_as_data_sheets_write_it(text: str, num_bytes: float) -> None:
    assert parse_endurance(text) == num_bytes


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "demo", "--hardware", "4090", "--endurance", "long"], "--endurance: not an endurance (given: long)"),
    (["--model", "demo", "--hardware", "4091"], "hardware: neither a machine known here"),
    (["--model", "demo", "--hardware", "none"], "--hardware: without the machine's numbers nothing is predicted"),
    (["--model", "demo", "--ssds", "2"], "--ssds: is about a machine that is not this one"),
    (["--model", "demo", "--device", "cpu"], "--hardware: this machine has no GPU to plan for"),
    (["--model", "demo", "--hardware", "4090", "--ssds", "2", "--ssd", "/a"], "--ssds: says again how many SSDs"),
    (["--hardware", "4090"], "--model: is missing"),
    (["--model", "demo", "--hardware", "4090", "--seq-len", "4096"], "--seq-len: the model handles sequences of at most"),
    (["--model", "demo", "--lr", "1"], "--lr: is not an option here"),
])
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"ratel: {message}") and err.count("\n") == 1 and out == ""


def test_budgets_of_another_machine() -> None:
    hardware = load_hardware("4090")
    machine = machine_for(resolve({"hardware": "4090"}), ssds=3, ssd_space=10**12)
    assert hardware.gpu_bytes - 2 * 2**30 < machine.gpu_budget < hardware.gpu_bytes
    assert machine.dram_budget == int(0.9 * hardware.dram_bytes)
    assert (machine.ssd_budget, machine.capacities, len(machine.hardware.ssds)) == (10**12, (10**12 // 3,) * 3, 3)
    given = machine_for(resolve({"hardware": "4090", "gpu_memory": "10GiB", "dram": "20GiB"}), ssds=0)
    assert (given.gpu_budget, given.dram_budget, given.ssd_budget) == (10 * 2**30, 20 * 2**30, None)


def test_planning_is_a_function_and_light_to_import() -> None:
    check = ("import ratel.planner.search.search, ratel; assert callable(ratel.plan) and callable(ratel.train); "
             "from ratel import plan; assert callable(plan); import sys; assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 0, done.stderr


# --- the largest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100, 1000])
def test_the_largest_count_is_found(limit: int) -> None:
    asked: list[int] = []
    assert largest_count(lambda count: asked.append(count) or count <= limit, most=1000) == limit
    assert len(asked) <= 22 and max(asked) <= 1000


def test_a_model_of_another_depth(tight: Any) -> None:
    spec = tight.plan.spec
    blocks = sum(stage.kind == "block" for stage in spec.stages)
    assert with_depth(spec, blocks) == spec
    deeper = with_depth(spec, blocks + 3)
    a_block = next(unit for unit in spec.units if unit.kind == "block").num_params
    assert deeper.num_params == spec.num_params + 3 * a_block
    assert [u.index for u in deeper.units] == list(range(len(deeper.units)))
    assert all(deeper.units[i].name == stage.name for stage in deeper.stages if stage.kind == "block" for i in stage.units)
    assert with_depth(deeper, blocks) == spec


def test_the_largest_batch_fits_and_the_next_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    budgets = ["--model", "llama-160m", "--hardware", "4090", "--seq-len", "1024", "--ssds", "1", "--ssd-space", "4GiB",
               "--dtype", "bf16", "--gpu-memory", "2GiB", "--dram", "3.5GiB"]
    largest = json.loads(output_of(capsys, *budgets, "--largest", "batch", "--json"))["largest_batch"]
    assert largest > 8
    assert cli.main(["plan", *budgets, "--micro-batch", "1", "--no-advice", "--batch-size", str(largest)]) == 0
    assert cli.main(["plan", *budgets, "--micro-batch", "1", "--no-advice", "--batch-size", str(largest + 1)]) == 2


def test_the_largest_model_grows_with_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    def largest(*budgets: str) -> dict[str, Any]:
        arguments = ["--model", "llama-1b", "--hardware", "4090", "--batch-size", "4", "--ssds", "0", *budgets]
        return json.loads(output_of(capsys, *arguments, "--largest", "model", "--json"))["largest_model"]

    small, large = largest("--gpu-memory", "6GiB", "--dram", "12GiB"), largest("--gpu-memory", "6GiB", "--dram", "24GiB")
    assert 1.5e8 < small["num_params"] < large["num_params"] < 24 * 2**30 / 10
    assert largest("--gpu-memory", "300MiB", "--dram", "4GiB") is None


# --- files ----------------------------------------------------------------------------------------------------------


def test_picture_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    picture, trace = tmp_path / "plan.svg", tmp_path / "step.json"
    output_of(capsys, *SMALL, *TIGHT, "--no-advice", "--plot", str(picture), "--trace", str(trace))
    assert picture.read_text().startswith("<?xml") and (picture.stat().st_size > 5000)
    lanes = {e["args"]["name"] for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "M"}
    assert {"compute", "h2d", "d2h"} <= lanes


@pytest.mark.parametrize(("flag", "name", "message"), [
    ("--plot", "plan.xyz", "Give a file that ends in .png"), ("--plot", "none/x.png", "--plot: cannot be written"),
    ("--trace", "none/x.json", "--trace: cannot be written")])
def test_files_that_cannot_be_written_are_refused_before_anything_is_planned(
        flag: str, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    assert cli.main(["plan", "--model", "llama-8b", "--no-advice", flag, str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_a_directory_without_weights_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who asks whether a model fits has not downloaded it yet. Training says what is missing."""
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=128,
                max_position_embeddings=64).save_pretrained(tmp_path)
    options = ("--model", str(tmp_path), "--batch-size", "2", "--seq-len", "32", "--hardware", "4090")
    assert f"{tmp_path.name} fits on" in output_of(capsys, *options, "--no-advice")
    assert "largest batch: " in output_of(capsys, *options, "--largest", "batch")
    with pytest.raises(RatelError, match="no model.safetensors and no"):
        ratel.train(str(tmp_path), steps=1, seq_len=32, device="cpu", out=str(tmp_path / "run"))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ratel.cli.plan_picture import check_can_draw

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RatelError, match="pip install matplotlib"):
        check_can_draw(tmp_path / "plan.png")


def test_small_items_are_summed() -> None:
    assert summed({"a": 1, "b": 980, "c": 19}) == [("b", 980), ("other", 20)]
    assert table([("x", "1"), ("long", "100")]) == ["x       1", "long  100"]


@pytest.mark.unit
@pytest.mark.parametrize("durable", ["step", "checkpoint"])
def test_what_saving_costs(durable: str) -> None:
    """Bytes as the mode moves them, seconds as the SSDs take for them."""
    hardware = load_hardware("h200-box")
    placement = {"*": "dram", "block.*": STATES_ON_SSD["*"]}
    plan = replace(make_plan(gpt_spec(8, 1024), placement), durable=durable)
    found = saving(plan, hardware, save_every=10)
    states = {tier: sum(plan.formats.num_bytes(u, p) for u in plan.spec.units for p in PLANES if plan.placement(u).tier(p) == tier)
              for tier in ("gpu", "dram", "ssd")}
    elsewhere = states["gpu"] + states["dram"]
    assert states["ssd"] and (found.read_bytes, found.written_bytes) == (
        (0, elsewhere) if durable == "step" else (states["ssd"], elsewhere + states["ssd"]))
    assert found.seconds == ssd_rates(hardware).seconds(found.read_bytes, found.written_bytes)
    assert found.step_s == found.seconds / 10
    assert found.commit_space_bytes >= 2 * sum(states.values())
    assert saving(plan, None).seconds is None and saving(plan, None).step_s is None
    assert "every 10 steps" in found.describe() and ("in place" in found.describe())
