"""Jobs of systems.py in processes of their own, with a time limit each; what a process leaves
behind on SSDs is removed."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.report import Clock, script_command
from benchmarks.harness.systems import Job
from benchmarks.harness.watched import run_watched

SYSTEMS = script_command("harness.systems")
LEAST_S = 20.0
"""Less than a process needs to import PyTorch and make its first step: nothing is begun with less
time left."""

NOT_BEGUN = "not begun: the time budget was used up"

RunJob = Callable[[Job, float], list[dict[str, Any]]]


def run_job(job: Job, limit_s: float) -> list[dict[str, Any]]:
    """A result for each batch size, ``error`` in those that have none. ``dram_peak_bytes`` is of
    the whole process, taken from outside and in the same way for every system."""
    with tempfile.TemporaryDirectory() as folder:
        spec, target = Path(folder) / "spec.json", Path(folder) / "results.json"
        spec.write_text(json.dumps(asdict(job)), encoding="utf-8")
        ended = run_watched([*SYSTEMS, str(spec), str(target)], limit_s)
        results = json.loads(target.read_text(encoding="utf-8")) if target.exists() else []
    problem = ended.problem or "no result"
    results += [{"batch_size": batch, "seq_len": job.seq_len, "error": problem} for batch in job.batches[len(results) :]]
    return [{**result, "dram_peak_bytes": ended.dram_peak_bytes, "process_s": ended.seconds} for result in results]


def run_within(clock: Clock, job: Job, limit_s: float, runner: RunJob = run_job) -> list[dict[str, Any]]:
    """`run_job` while there is time; otherwise results that say that there was none."""
    if clock.left_s < LEAST_S:
        return [{"batch_size": batch, "seq_len": job.seq_len, "error": NOT_BEGUN}
                for batch in job.batches]
    return runner(job, min(limit_s, clock.left_s))


def emptied(directory: str | Path) -> str:
    """A folder of that name with nothing in it."""
    shutil.rmtree(directory, ignore_errors=True)
    Path(directory).mkdir(parents=True)
    return str(directory)
