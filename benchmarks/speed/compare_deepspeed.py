"""Ratel beside DeepSpeed's ZeRO-Offload and ZeRO-Infinity, and beside training without offloading:
same work, same machine, by turns.

    python -m benchmarks.speed.compare_deepspeed --ssd /mnt/a --json benchmarks/results/MACHINE_compare.json
    python -m benchmarks.speed.compare_deepspeed --ssd /mnt/a --states ssd --budget-s 580 --json ...

Every system gets the same model (Hugging Face's, gradient checkpointing), weights, tokens, learning
rate, clipping and cap on GPU memory; each run is a process of its own. The losses are held to those
of plain PyTorch with fp32 masters in GPU memory (no cap). A second call with the same file adds to
it. Needs `pip install -e .[deepspeed]` for DeepSpeed's rows; the others run without.
"""

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables.compare_table import compare_lines, loss_checks
from benchmarks.harness.jobs import SYSTEMS, RunJob, emptied, run_job, run_within
from benchmarks.harness.report import Clock, Report
from benchmarks.harness.systems import ALWAYS, NEVER, Job, read_model
from benchmarks.harness.watched import run_watched

MISSING = "DeepSpeed is not installed: pip install -e .[deepspeed]"
BUILD_LIMIT_S = 400.0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One system on one piece of work. ``group`` is what can be left out with --states."""

    name: str
    group: str
    job: Job
    limit_s: float


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3b", help="preset, or a configuration as JSON")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="the first alone on SSDs")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--states", nargs="+", choices=["dram", "ssd"], default=["dram", "ssd"])
    parser.add_argument("--gpu-memory", default="24GiB", help="cap for all that offload")
    parser.add_argument("--dram", default="100GiB", help="Ratel's budget where states are in DRAM")
    parser.add_argument("--ssd-dram", nargs="+", default=["47GiB", "16GiB"], help="Ratel's budgets beside the SSD")
    parser.add_argument("--ssd", help="a directory on the SSD")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="that count")
    parser.add_argument("--ssd-steps", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=1500)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--json")
    args = parser.parse_args(arguments)
    if "ssd" in args.states and args.ssd is None:
        parser.error("--ssd DIR is needed, or --states dram")
    return args


def entries(args: argparse.Namespace) -> Iterator[Entry]:
    """The entries of one round, what matters most first."""
    work = {"model": read_model(args.model), "seq_len": args.seq_len, "device": args.device, "dtype": args.dtype, "lr": args.lr}
    dram = {**work, "steps": args.steps, "gpu_memory": args.gpu_memory}

    def memory(name: str, batch: int, clip: float, **options: Any) -> Entry:
        job = Job(system="memory", batches=(batch,), clip=clip, options=options, steps=args.steps, **work)
        return Entry(name=name, group="dram", job=job, limit_s=120)

    def ratel(batch: int, clip: float, name: str = "Ratel, states in DRAM", **options: Any) -> Entry:
        job = Job(system="ratel", batches=(batch,), clip=clip, options={"dram": args.dram, **options}, **dram)
        return Entry(name=name, group="dram", job=job, limit_s=180)

    for batch in args.batch:
        yield memory("in GPU memory, fp32 states", batch, NEVER)
        yield ratel(batch, NEVER)
        yield Entry(name="ZeRO-Offload", group="dram", limit_s=300,
                    job=Job(system="zero", batches=(batch,), clip=NEVER, options={"place": "cpu"}, **dram))
    for batch in args.batch:
        yield ratel(batch, ALWAYS)
        yield memory("in GPU memory, bf16 states", batch, NEVER, states="compute")
    for batch in args.batch if args.device == "cuda" else ():  # for a CPU it takes minutes
        yield ratel(batch, NEVER, "Ratel, states in DRAM, compiled", compile="on")
    for batch in args.batch:
        yield memory("in GPU memory, fp32 states", batch, ALWAYS)
    if "ssd" in args.states:
        yield from _on_ssd(args, work)


def _on_ssd(args: argparse.Namespace, work: dict[str, Any]) -> Iterator[Entry]:
    slow = {**work, "batches": (args.batch[0],), "clip": NEVER, "gpu_memory": args.gpu_memory, "steps": args.ssd_steps}
    folder = str(Path(args.ssd) / "ratel-compare")
    if "dram" not in args.states:  # else there is a reference already
        reference = {**slow, "gpu_memory": None}
        yield Entry(name="in GPU memory, fp32 states", group="ssd", limit_s=120, job=Job(system="memory", **reference))
    for dram in args.ssd_dram:
        yield Entry(name=f"Ratel, {dram} of DRAM and the SSD", group="ssd", limit_s=240,
                    job=Job(system="ratel", options={"dram": dram, "ssd": [folder]}, **slow))
    # Each of its steps takes a minute here, and it has no state that the second step would be slow
    # for.
    yield Entry(name="ZeRO-Infinity", group="ssd", limit_s=420,
                job=Job(system="zero", options={"place": "nvme", "directory": folder}, **{**slow, "warmup": 1}))


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def build_operators(found: bool) -> dict[str, Any]:
    """DeepSpeed compiles its native operators on first use: before anything is timed, and only
    once."""
    if not found:
        print(MISSING, flush=True)
        return {"problem": MISSING}
    ended = run_watched([*SYSTEMS, "--build"], BUILD_LIMIT_S)
    print(f"DeepSpeed's operators: {ended.seconds:.0f} s, {ended.problem or 'built'}", flush=True)
    return {"version": ended.last_lines.splitlines()[-1] if ended.problem is None else None, "build_s": ended.seconds,
            "problem": ended.problem}


def compare(args: argparse.Namespace, runner: RunJob = run_job) -> Report:
    clock = Clock(args.budget_s)
    found = has_deepspeed()
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    report = Report(args.json, gpu=gpu, torch=torch.__version__, deepspeed=build_operators(found))
    first = 1 + max((point["round"] for point in report.points), default=0)
    for number in range(first, first + args.rounds):
        for entry in entries(args):
            if entry.group in args.states:
                report.add(_measure(entry, number, clock, found, runner))
    report.write(losses=loss_checks(report.points))
    return report


def _measure(entry: Entry, number: int, clock: Clock, found: bool, runner: RunJob) -> dict[str, Any]:
    folder = entry.job.options.get("directory") or entry.job.options.get("ssd", [None])[0]
    if folder:
        emptied(folder)
    if entry.job.system == "zero" and not found:
        result = {"batch_size": entry.job.batches[0], "seq_len": entry.job.seq_len, "error": MISSING}
    else:
        result = run_within(clock, entry.job, entry.limit_s, runner)[0]
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    said = result.get("error") or f"{result['step_s']:.3f} s/step"
    print(f"round {number}, {entry.name}, batch {result['batch_size']}, clip {entry.job.clip:g}: {said}", flush=True)
    job = entry.job
    return {"round": number, "name": entry.name, "system": job.system, "group": entry.group, "clip": job.clip,
            "warmup": job.warmup, "options": job.options, **result}


def main() -> None:
    report = compare(parse())
    print("\n".join(compare_lines(report.points)))
    unequal = [check for check in loss_checks(report.points) if not check["equal"]]
    sys.exit(f"losses differ: {unequal}" if unequal else 0)


if __name__ == "__main__":
    main()
