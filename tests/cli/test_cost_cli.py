"""`ratel cost`: lines for every machine and form of rows, dollars that are steps times seconds times
a price, calibration, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

import ratel
from ratel import cli
from ratel.planner.formats import FORMATS

pytestmark = pytest.mark.unit
SMALL = ["--model", "llama-160m", "--batch-size", "8", "--seq-len", "128", "--dtype", "bf16", "--activations", "recompute"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cost") / "data.jsonl"
    path.write_text("".join(json.dumps({"text": "ab " * (2 + number * 5 % 30)}) + "\n" for number in range(300)))
    return path


def output_of(capsys: pytest.CaptureFixture[str], data: Path, *arguments: str) -> str:
    assert cli.main(["cost", *SMALL, "--data", str(data), *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refusal_of(capsys: pytest.CaptureFixture[str], data: Path, *arguments: str) -> str:
    assert cli.main(["cost", *SMALL, "--data", str(data), *arguments]) == 2
    return capsys.readouterr().err


def costs_of(capsys: pytest.CaptureFixture[str], data: Path, *arguments: str) -> list[dict[str, Any]]:
    return json.loads(output_of(capsys, data, *arguments, "--json"))["costs"]


def test_every_line_is_steps_times_seconds_times_a_price(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    found = costs_of(capsys, data, "--gpu", "h100,4090", "--states", "exact", "--epochs", "3")
    assert [(line["rented"]["name"], line["epoch"]["form"]) for line in found] == [
        ("h100", "packed"), ("h100", "padded"), ("4090", "packed"), ("4090", "padded")]
    for line in found:
        assert line["steps"] == -(-line["epoch"]["rows"] * 3 // 8) and line["hours"] == pytest.approx(line["steps"] * line["step"]["seconds"] / 3600)
    assert [line["dollars"] for line in found[:2]] == pytest.approx([2.1 * line["hours"] for line in found[:2]])
    assert found[2]["dollars"] is None and {line["basis"] for line in found} == {"data sheet", "paper"}


def test_a_packed_step_is_the_planner_s(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    (packed,) = costs_of(capsys, data, "--gpu", "h100", "--states", "bf16", "--rows", "packed")
    planned = ratel.plan("llama-160m", hardware="h100", batch_size=8, seq_len=128, dtype="bf16", states="bf16", activations="recompute",
                         advice=False)
    assert packed["step"]["seconds"] == planned.prediction.step_s and packed["step"]["bound_by"] == planned.prediction.bound_by
    assert packed["step"]["gpu_bytes"] == planned.plan.gpu_bytes and packed["states"] == "bf16"


def test_padded_rows_are_as_wide_as_the_longest_of_a_batch(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    packed, padded = costs_of(capsys, data, "--gpu", "a40", "--states", "exact")
    assert padded["epoch"]["rows"] == 300 > packed["epoch"]["rows"]
    assert packed["epoch"]["row_tokens"] == 128 > padded["epoch"]["row_tokens"] > padded["epoch"]["tokens"] / 300
    assert padded["epoch"]["padding"] > packed["epoch"]["padding"] >= 0
    assert padded["step"]["seconds"] <= packed["step"]["seconds"]
    (one,) = costs_of(capsys, data, "--gpu", "a40", "--states", "exact", "--rows", "padded", "--batch-size", "1")
    assert one["epoch"]["padding"] == pytest.approx(0, abs=1e-9)


def test_what_does_not_fit_is_a_line_that_says_so(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    text = output_of(capsys, data, "--gpu", "a40", "--gpu-memory", "400MiB", "--dram", "3GiB", "--states", "exact")
    assert "does not fit" in text and "a40 with packed rows and exact states: gpu_memory: GPU memory is short by" in text


def test_the_text_says_what_people_ask(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    text = output_of(capsys, data)
    for words in ("300 texts", "cheapest: ", "fastest: ", "price: a40 $0.79/h as of 2024-08, CUDO Compute", "rests on", "data sheet", "paper",
                  "padding", "largest", "bf16", "exact", "note: h100: DRAM: 90% of"):
        assert words in text, words
    assert sum(line.startswith(("a40 ", "a100-80 ", "h100 ")) for line in text.splitlines()) == 3 * 2 * len(FORMATS)


def test_a_table_and_a_machine_s_part_of_its_host_are_obeyed(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    table = tmp_path / "prices.toml"
    table.write_text('[mine]\ndollars_per_hour = 1\nas_of = "2026"\nsource = "me"\nmachine = "h100"\ndram = "8GiB"\nssds = 0\nwatts = 500\n')
    (line,) = costs_of(capsys, data, "--price", str(table), "--states", "exact", "--rows", "packed", "--gpu-memory", "600MiB", "--tier", "dram")
    assert line["step"]["dram_bytes"] < 8 << 30 and line["step"]["ssd_bytes"] == 0
    assert line["dollars"] == pytest.approx(line["hours"]) and line["kwh"] == pytest.approx(line["hours"] / 2)
    assert "energy: mine at most" in output_of(capsys, data, "--price", str(table), "--states", "exact", "--rows", "packed")


def test_measured_steps_calibrate_the_machine(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    """Steps that the planner itself predicts for an H100, and a tenth of a second with each: an
    A100 that was measured so is one."""
    points = tmp_path / "points.json"
    measured = [{"batch": batch, "length": length, "seconds": 0.1 + _saturated_s(batch, length)} for batch, length in ((8, 64), (8, 128), (32, 128))]
    points.write_text(json.dumps(measured))
    found = json.loads(output_of(capsys, data, "--gpu", "a100-80", "--states", "exact", "--rows", "packed", "--fit", str(points), "--json"))
    fitted, (line,) = found["calibration"], found["costs"]
    # The A100's own memory is taken to be as slow as before: the rest is the rate.
    assert fitted["num_points"] == 3 and fitted["overhead_s"] == pytest.approx(0.1, rel=0.05) and fitted["error"] < 0.05
    assert line["basis"] == "fitted" and line["step"]["overhead_s"] == fitted["overhead_s"]
    assert line["step"]["seconds"] == pytest.approx(0.1 + _saturated_s(8, 128), rel=0.05)


def _saturated_s(batch: int, length: int) -> float:
    from dataclasses import replace

    from ratel.planner.machine.hardware import load_hardware

    hardware = replace(load_hardware("h100"), gpu_half_tokens=0, gpu_flops=30e12)
    return ratel.plan("llama-160m", hardware=hardware, batch_size=batch, seq_len=length, dtype="bf16", activations="recompute", advice=False).prediction.step_s


@pytest.mark.parametrize("arguments, said", [
    (["--gpu", "a99"], "--gpu: is neither in the table of prices nor a machine (given: a99)"),
    (["--price", "absent.toml"], "--price: cannot be read"),
    (["--fit", "absent.json"], "--fit: cannot be read"),
    (["--task", "classify"], "--task: is not what lengths are counted for"),
    (["--epochs", "0"], "--epochs"),
    (["--hardware", "h100"], "--hardware: is not an option here")])
def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], data: Path, arguments: list[str], said: str) -> None:
    assert said in refusal_of(capsys, data, *arguments)


def test_measured_steps_are_of_one_gpu_and_no_longer_than_rows(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    points = tmp_path / "points.json"
    points.write_text(json.dumps([{"batch": 1, "length": 4096, "seconds": 1}, {"batch": 2, "length": 64, "seconds": 1}]))
    assert "--fit: was measured on one GPU" in refusal_of(capsys, data, "--fit", str(points))
    assert "--fit length: must be from 2 to --seq-len 128" in refusal_of(capsys, data, "--gpu", "h100", "--fit", str(points))


def test_an_epoch_without_a_text_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert "there is not one row in it" in refusal_of(capsys, empty)


def test_an_adapter_stands_beside_the_whole_model(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    adapter, whole = costs_of(capsys, data, "--gpu", "h100", "--states", "exact", "--rows", "packed", "--lora", "8")
    (alone,) = costs_of(capsys, data, "--gpu", "h100", "--states", "exact", "--rows", "packed")
    assert adapter["trains"] == "rank 8" and whole == alone and whole["trains"] == "all"
    planned = ratel.plan("llama-160m", hardware="h100", batch_size=8, seq_len=128, dtype="bf16", lora=8, activations="recompute", advice=False)
    assert adapter["step"]["seconds"] == planned.prediction.step_s


def test_a_model_that_cannot_keep_documents_apart_has_rows_of_one(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    config = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    alone, padded = costs_of(capsys, data, "--model", str(tmp_path), "--gpu", "a40", "--states", "exact")
    assert [alone["epoch"]["form"], padded["epoch"]["form"]] == ["alone", "padded"]
    assert alone["epoch"]["rows"] == padded["epoch"]["rows"] == 300 and alone["epoch"]["row_tokens"] == 128
    assert alone["epoch"]["padding"] > padded["epoch"]["padding"] > 0
