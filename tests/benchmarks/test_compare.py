"""The comparison with other systems: equal weights, tokens and settings give equal losses, and
failures are results, too."""

import copy
import json
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.harness import jobs, watched
from benchmarks.harness.report import Clock, Report
from benchmarks.harness.systems import SYSTEMS, Job
from benchmarks.speed import compare_deepspeed as comparison
from benchmarks.tables import compare_table
from tests.support.patience import patience, wait_until

TINY = {"model_type": "llama", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}


def run_here(job: Job, limit_s: float) -> list[dict]:
    return [{**SYSTEMS[job.system](job, batch), "dram_peak_bytes": 1 << 20} for batch in job.batches]


def arguments(path: Path, *more: str) -> list[str]:
    return ["--model", json.dumps(TINY), "--device", "cpu", "--batch", "2", "--seq-len", "16", "--steps", "2", "--ssd-steps", "2",
            "--dram", "2GiB", "--ssd-dram", "2GiB", "--json", str(path), *more]


@pytest.fixture
def no_deepspeed(monkeypatch) -> None:
    monkeypatch.setattr(comparison, "has_deepspeed", lambda: False)


@pytest.mark.numerics
def test_ratel_and_training_in_memory_have_equal_losses(tmp_path: Path, ssd_dir: Path, no_deepspeed) -> None:
    path = tmp_path / "compare.json"
    args = comparison.parse(arguments(path, "--dtype", "fp32", "--lr", "1e-2", "--rounds", "1", "--ssd", str(ssd_dir)))
    report = comparison.compare(args, runner=run_here)
    good = {(p["name"], p["clip"]): p["losses"] for p in report.points if "error" not in p}
    for clip in (comparison.NEVER, comparison.ALWAYS):
        assert good["Ratel, states in DRAM", clip] == good["in GPU memory, fp32 states", clip]  # bit for bit in fp32
    assert good["Ratel, 2GiB of DRAM and the SSD", comparison.NEVER] == good["in GPU memory, fp32 states", comparison.NEVER][:4]
    assert good["Ratel, states in DRAM", comparison.NEVER] != good["Ratel, states in DRAM", comparison.ALWAYS]
    saved = json.loads(path.read_text())
    assert saved["points"] == json.loads(json.dumps(report.points)) and all(check["equal"] for check in saved["losses"])
    missing = [p for p in saved["points"] if p["name"].startswith("ZeRO")]
    assert len(missing) == 2 and all(p["error"] == comparison.MISSING for p in missing)
    assert not list(ssd_dir.iterdir())
    assert not any(check["first"] for check in saved["losses"] if check["name"].startswith("Ratel"))
    table = "\n".join(compare_table.compare_lines(saved["points"]))
    assert "| ZeRO-Offload | failed: DeepSpeed is not installed" in table and "NOT EQUAL" not in table


@pytest.mark.unit
def test_losses_that_differ_are_seen() -> None:
    work = {"batch_size": 8, "seq_len": 4, "clip": 1e9, "round": 1}
    reference = {**work, "name": compare_table.REFERENCE, "losses": [8.0, 7.5, 7.0]}
    other = {**work, "name": "other", "losses": [8.0 * (1 + 2**-13), 7.5, 7.0]}
    [check] = compare_table.loss_checks([reference, other])
    assert check["equal"] and check["first"] == pytest.approx(2**-13) and check["fall"] == 1.0
    for losses in ([8.0 * (1 + 2**-11), 7.5, 7.0], [8.0, 7.5, 7.0 * (1 - 2**-9)], [float("nan"), 7.5, 7.0]):
        [check] = compare_table.loss_checks([reference, {**other, "losses": losses}])
        assert not check["equal"]
    [check] = compare_table.loss_checks([reference, {**other, "name": "in GPU memory, bf16 states", "losses": [8.0, 8.0, 8.0]}])
    assert check["equal"] and check["later"] is None  # weights that are too coarse for the learning rate do not move


@pytest.mark.unit
def test_a_later_call_adds_rounds_and_medians_count(tmp_path: Path, no_deepspeed) -> None:
    taken = iter([1.0, 3.0, 2.0, 9.0])

    def runner(job: Job, limit_s: float) -> list[dict]:
        step_s = next(taken) if job.system == "ratel" and job.clip > 1 else 0.5
        return [{"batch_size": 2, "seq_len": 16, "step_s": step_s, "tokens_per_s": 1 / step_s, "tflops_6pn": 1 / step_s,
                 "losses": [1.0], "start_s": 1.0, "gpu_peak_bytes": None, "dram_peak_bytes": 0, "ssd_read_bytes": 0,
                 "ssd_written_bytes": 0}]

    args = comparison.parse(arguments(tmp_path / "compare.json", "--rounds", "1", "--states", "dram"))
    for _ in range(3):
        report = comparison.compare(copy.copy(args), runner=runner)
    assert {p["round"] for p in report.points} == {1, 2, 3}
    [line] = [line for line in compare_table.compare_lines(report.points) if "| never | Ratel" in line]
    assert "| 2.000 | 1.000 to 3.000 |" in line and "| 4.00 |" in line  # the median, the range, and over 0.5 of the floor


@pytest.mark.unit
def test_nothing_is_begun_without_time(tmp_path: Path, no_deepspeed) -> None:
    args = comparison.parse(arguments(tmp_path / "compare.json", "--rounds", "1", "--states", "dram", "--budget-s", "1"))
    report = comparison.compare(args, runner=lambda job, limit_s: pytest.fail("begun"))
    assert report.points and all("error" in point for point in report.points)
    assert any("time budget" in point["error"] for point in report.points)


def is_running(pid: str) -> bool:
    return psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE


@pytest.mark.unit
def test_a_command_is_ended_at_its_limit_with_what_it_started() -> None:
    ended = watched.run_watched(["sh", "-c", "echo begun; sleep 600 & echo $! $$; wait"], patience(0.5))
    assert ended.exit_status is None and "begun" in (ended.problem or "")
    wait_until(lambda: not any(map(is_running, ended.last_lines.splitlines()[-1].split())))
    failed = watched.run_watched(["sh", "-c", "for i in $(seq 40); do echo line $i; done; exit 3"], 30)
    assert failed.exit_status == 3 and failed.last_lines.splitlines()[-1] == "line 40"
    assert len(failed.last_lines.splitlines()) == watched.LAST_LINES and "exit status 3" in (failed.problem or "")
    assert watched.run_watched(["true"], 30).problem is None


@pytest.mark.unit
def test_memory_that_a_command_takes_is_seen() -> None:
    code = f"import time; held = bytearray(b'x' * (400 << 20)); time.sleep({patience(0.5)})"
    assert watched.run_watched([sys.executable, "-c", code], 60).dram_peak_bytes > 200 << 20


@pytest.mark.unit
def test_a_job_that_dies_on_the_way_keeps_what_it_had(tmp_path: Path, monkeypatch) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json, sys\nspec = json.load(open(sys.argv[1]))\n"
                      "json.dump([{'batch_size': spec['batches'][0], 'step_s': 0.5}], open(sys.argv[2], 'w'))\n"
                      "sys.exit('out of memory')")
    monkeypatch.setattr(jobs, "SYSTEMS", [sys.executable, str(script)])
    done, failed = jobs.run_job(Job(system="ratel", model="demo", batches=(8, 32)), 60)
    assert (done["batch_size"], done["step_s"]) == (8, 0.5) and "error" not in done
    assert failed["batch_size"] == 32 and "out of memory" in failed["error"] and "dram_peak_bytes" in failed


@pytest.mark.unit
def test_a_report_on_disk_is_whole_after_every_point(tmp_path: Path) -> None:
    report = Report(str(tmp_path / "r.json"), gpu=None)
    report.add({"name": "a"})
    assert json.loads((tmp_path / "r.json").read_text())["points"] == [{"name": "a"}]
    report.write(more=1)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["more"] == 1 and found["commit"] and found["host"]["cpu"]
    assert Report(str(tmp_path / "r.json")).points == [{"name": "a"}] and Clock(5).left_s <= 5
