"""The measurements against the machine's limits: what they ask of a session, what they make of its
answers, and their tables."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.disk_rate import mixed_bps
from benchmarks.harness.systems import SYSTEMS, Job
from benchmarks.speed import startup, targets
from benchmarks.tables import evaluation, plots, target_tables
from tests.support.patience import patience

TINY = {"model_type": "llama", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
GB = 10**9


def result(batch: int = 8, **more: Any) -> dict[str, Any]:
    return {"batch_size": batch, "seq_len": 1024, "parameters": 3 * GB, "step_s": 2.0, "tokens_per_s": batch * 512.0, "tflops_6pn": 74.0,
            "fraction_of_bound": 0.9, "bound_by": "ssd", "predicted_s": 1.6, "ssd_read_bytes": 1 * GB, "ssd_written_bytes": 1 * GB,
            "gpu_peak_bytes": 1 << 30, "dram_peak_bytes": 1 << 34, "losses": [2.0, 1.5], "all_steps_s": [2.0] * 8, "start_s": 1.0,
            "all_rss_bytes": [1 << 30] * 8, "all_gpu_reserved_bytes": [0] * 8,
            "traced": {"exposed_optimizer_s": 0.125, "fraction_of_bound_at_rate": 0.83, "bound_at_rate_by": "ssd"},
            "plan": {"work": {"micro_batches": 1}, "dram_bytes": {"buffers": 1 << 33}}, **more}


def fake(job: Job, limit_s: float) -> list[dict[str, Any]]:
    return [result(batch) for batch in job.batches]


def parse(kind: str, path: Path, *more: str) -> Any:
    return targets.parse([kind, "--device", "cpu", "--json", str(path), *more])


@pytest.mark.native
def test_ssd_steps_are_held_to_what_the_disk_carried_meanwhile(tmp_path: Path, ssd_dir: Path) -> None:
    args = parse("ssd", tmp_path / "m_ssd.json", "--ssd", str(ssd_dir), "--ram-disk", str(ssd_dir / "ram"), "--probe-bytes", str(32 << 20))
    report = targets.measure(args, runner=fake)
    assert [p["cap_bps"] for p in report.points] == [None, 3.2 * GB, 6.4 * GB, 0.8 * GB]
    assert all(len(p["disk_bps"]) == 2 and min(p["disk_bps"]) > 1e6 for p in report.points)
    assert not (ssd_dir / "ratel-targets").exists()
    uncapped, slowest = report.points[0], report.points[-1]
    mean = sum(uncapped["disk_bps"]) / 2
    assert target_tables.disk_bound(uncapped) == pytest.approx((mean, 2 * GB / mean))
    assert target_tables.disk_bound({**slowest, "disk_bps": [9.0 * GB, 11.0 * GB]}) == pytest.approx((0.8 * GB, 2.5))
    assert target_tables.disk_bound({**slowest, "disk_bps": [None, None]})[0] == 0.8 * GB  # a RAM disk without O_DIRECT
    assert "16GiB" in "\n".join(target_tables.target_lines("ssd", report.content))


@pytest.mark.native
def test_a_file_system_without_direct_access_has_no_rate(monkeypatch) -> None:
    from benchmarks.harness import disk_rate

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(disk_rate, "EngineRunner", refuse)
    assert mixed_bps("/nowhere", 64 << 20) is None


@pytest.mark.unit
def test_nothing_is_planned_with_a_rate_that_cannot_be_measured(tmp_path: Path, ssd_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(targets, "mixed_bps", lambda directory, num_bytes: None)
    asked: list[dict[str, Any]] = []

    def runner(job: Job, limit_s: float) -> list[dict[str, Any]]:
        asked.append(job.options)
        return fake(job, limit_s)

    content = targets.measure(parse("ssd", tmp_path / "m_ssd.json", "--ssd", str(ssd_dir), "--only", "3"), runner).content
    assert [options["hardware"] for options in asked] == ["none"]
    assert target_tables.disk_bound(content["points"][0])[0] == 0.8 * GB
    without = targets.measure(parse("ssd", tmp_path / "other_ssd.json", "--ssd", str(ssd_dir), "--only", "1"), runner).content
    assert "no --ram-disk" in without["points"][0]["error"] and len(asked) == 1


@pytest.mark.unit
def test_dram47_takes_the_other_s_time_from_the_comparison(tmp_path: Path, ssd_dir: Path) -> None:
    compare = tmp_path / "m_compare.json"
    compare.write_text(json.dumps({"points": [{"name": "ZeRO-Infinity", "step_s": 60.0}, {"name": "ZeRO-Infinity", "error": "out of memory"}]}))
    more = ["--ssd", str(ssd_dir), "--probe-bytes", str(32 << 20), "--compare", str(compare)]
    content = targets.measure(parse("dram47", tmp_path / "m_dram47.json", *more), runner=fake).content
    assert "60.0 s a step (`m_compare.json`): 30.0 times" in "\n".join(target_tables.target_lines("dram47", content))
    assert targets.infinity(None)["infinity_s"] is None


@pytest.mark.unit
def test_the_curve_compares_with_the_prediction_and_is_drawn(tmp_path: Path) -> None:
    args = parse("curve", tmp_path / "m_curve.json", "--batch", "8", "1", "4")
    content = targets.measure(args, runner=lambda job, limit_s: [*fake(job, limit_s)[:2], {"batch_size": 4, "seq_len": 1024, "error": "a\nb|c"}]
                              ).content
    lines = target_tables.target_lines("curve", content)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 1 x 1024", "| curve, batch 4", "| 8 x 1024"]
    assert "| 4,096 | 5,120 | +25% |" in lines[-1] and "failed: b/c" in lines[3]
    for name in ("one.svg", "two.svg"):
        plots.draw(tmp_path / name, "title", plots.curve(content))
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text() and "tokens/s" in drawn and "predicted" in drawn


@pytest.mark.unit
@pytest.mark.parametrize("what", ["layers", "batch_size"])
def test_the_largest_that_fits_are_drawn(what: str, tmp_path: Path) -> None:
    found = [{"dram_limit_bytes": limit << 30, what: count, "parameters": count * 10**6, "step_s": 0.5}
             for limit, count in ((16, 3), (32, 7))]
    plots.draw(tmp_path / "max.svg", "title", plots.largest([{"dram_limit_bytes": 1 << 30, what: 0}, *found]))
    assert "0.5 s/step" in (tmp_path / "max.svg").read_text()


@pytest.mark.unit
def test_a_case_that_fails_or_finds_no_time_is_in_the_results(tmp_path: Path, ssd_dir: Path) -> None:
    args = parse("shapes", tmp_path / "m_shapes.json", "--ssd", str(ssd_dir), "--budget-s", "1")
    content = targets.measure(args, runner=fake).content
    assert len(content["points"]) == 6 and all("time budget" in p["error"] for p in content["points"])
    lines = target_tables.target_lines("shapes", content)
    assert sum("failed: not begun" in line for line in lines) == 6


@pytest.mark.numerics
def test_many_steps_twice_have_equal_losses(tmp_path: Path) -> None:
    args = parse("sustained", tmp_path / "m_sustained.json", "--model", json.dumps(TINY), "--batch", "2", "--seq-len", "16", "--steps", "12",
                 "--again", "4", "--dram", "2GiB")
    content = targets.measure(args, runner=lambda job, limit_s: [{**SYSTEMS["ratel"](job, 2), "dram_peak_bytes": 0}]).content
    long, short = content["points"]
    assert len(long["all_rss_bytes"]) == 14 and short["losses"] == long["losses"][:6]
    lines = "\n".join(target_tables.target_lines("sustained", content))
    assert "The first 6 losses of all runs are equal, bit for bit" in lines
    short["losses"][3] += 1e-6
    assert "The first 3 losses of all runs are equal, bit for bit; those of the next 3 steps differ by" in "\n".join(
        target_tables.target_lines("sustained", content))


@pytest.mark.unit
def test_drift_is_of_the_counted_steps() -> None:
    seconds = [9.0, 9.0, *(1 + 0.001 * step for step in range(100))]
    rss = [*range(9), 1000, *[1000] * 50, *[1500] * 42]
    found = target_tables.drift({"all_steps_s": seconds, "warmup": 2, "all_rss_bytes": rss, "all_gpu_reserved_bytes": [7] * 102})
    assert found["slope"] == pytest.approx(0.1 / 1.0495) and found["slowest_s"] == pytest.approx(1.099)
    assert (found["first_s"], found["last_s"]) == pytest.approx((1.012, 1.087)) and (found["rss"], found["gpu"]) == (500, 0)


@pytest.mark.e2e
def test_the_checkpoint_of_the_start_is_one_that_loads(tmp_path: Path, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM

    from ratel.training.bench.step import fill_quickly

    monkeypatch.setattr(startup, "SHARD_BYTES", 16 << 10)
    files = startup.write_checkpoint(TINY, tmp_path)
    assert len(files) > 2 and not [file for file in files if not file.exists()]
    startup.drop_from_cache(files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = torch.empty(128, 32)
    fill_quickly(expected)
    assert torch.equal(loaded.lm_head.weight.float(), expected) and loaded.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.unit
def test_a_start_is_timed_from_outside(tmp_path: Path) -> None:
    code = ("import json, pathlib, sys, time\nout = pathlib.Path(sys.argv[1])\nout.mkdir()\ntime.sleep(0.5)\n"
            "(out / 'startup.json').write_text(json.dumps({'phases': [{'name': 'all', 'begin_s': 0, 'end_s': 1}]}))\n"
            "(out / 'metrics.jsonl').write_text(json.dumps({'step': 1, 'step_s': 0.2}) + '\\n')\ntime.sleep(60)")
    found = startup.time_run([sys.executable, "-c", code, str(tmp_path / "out")], tmp_path / "out", {}, patience(30))
    assert 0.5 < found["first_step_end_s"] and found["first_step_end_s"] - found["first_step_begin_s"] == pytest.approx(0.2)
    failed = startup.time_run(["sh", "-c", "echo no GPU; exit 2"], tmp_path / "none", {}, patience(30))
    assert "exit status 2: no GPU" in failed["error"]
    assert "no first step in time" in startup.time_run(["sleep", "60"], tmp_path / "none", {}, 0.2)["error"]
    content = {"points": [{"name": "known machine", **found}, {"name": "cached", **failed}], "read_s": 0.1, "read_bps": 2 * GB,
               "checkpoint_bytes": 6 << 30}
    lines = "\n".join(target_tables.target_lines("startup", content))
    assert "6.0 GiB at 2.00 GB/s" in lines and "all 0.0 to 1.0" in lines and "failed: exit status 2: no GPU" in lines


@pytest.mark.unit
@pytest.mark.parametrize("kind", list(target_tables.LINES))
def test_every_kind_of_results_has_its_section(kind: str, tmp_path: Path, monkeypatch) -> None:
    point = {"name": "x", **result(), "options": {"dram": "16GiB"}, "warmup": 2, "cap_bps": None, "disk_bps": [GB, GB], "round": 1,
             "group": "dram", "clip": 1e9, "first_step_begin_s": 3.0, "first_step_end_s": 4.0, "visit_s": 0.002}
    content = {"command": "python benchmarks/x.py", "host": {"cpu": {"model": "a processor"}}, "gpu": None, "torch": "2", "commit": "c" * 40,
               "points": [point, {**point, "name": "y"}, {"name": "z", "batch_size": 8, "group": "dram", "clip": 1e9, "error": "why"}]}
    (tmp_path / f"m_{kind}.json").write_text(json.dumps(content))
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    monkeypatch.setattr(evaluation, "ROOT", tmp_path)
    text = evaluation.document()
    assert kind != "shapes" or "| 90% (ssd) | 83% (ssd) | 1.600 | 0.125 |" in text
    assert f"## {target_tables.TITLES[kind]}: m_{kind}" in text and "a processor" in text and "commit cccccccccc" in text and "why" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows if "failed" not in row} == {rows[0].count("|")}
    evaluation.draw_pictures()
    assert (tmp_path / f"m_{kind}.svg").exists() == (kind == "curve") == ("](m_curve.svg)" in text)
