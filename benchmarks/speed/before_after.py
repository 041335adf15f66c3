"""Whether a change has made steps or the start slower: two checkouts on one machine, in turns.

    git worktree add ../before COMMIT
    python -m benchmarks.speed.before_after --before ../before --ssd /mnt/a --json benchmarks/results/MACHINE_change.json

Steps are `ratel bench step`, the start is `ratel train` from a checkpoint whose files are in
memory, up to the first line of metrics.jsonl. Every figure is a process of its own, and the
checkouts take turns, so that what else the machine does meets both. Each checkout keeps its caches
apart from the other's; what a first start finds out does not count.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.jobs import NOT_BEGUN
from benchmarks.harness.report import ROOT, Clock, Report
from benchmarks.speed.startup import time_run, write_checkpoint
from benchmarks.harness.systems import read_model

NATIVE = ("nvme_ds", "op_ds")
STEP_CASES = {
    "batch 8": ["--batch-size", "8", "--max-grad-norm", "1e9"],
    "batch 8, always clipped": ["--batch-size", "8", "--max-grad-norm", "1e-9"],
    "batch 32": ["--batch-size", "32", "--max-grad-norm", "1e9"],
}
LIMIT_S = 240.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the commit to compare with")
    parser.add_argument("--before-commit", help="its commit, where only a copy of it is")
    parser.add_argument("--model", default="llama-3b", help="preset of the steps")
    parser.add_argument("--start-model", default="llama-1b", help="preset of the start")
    parser.add_argument("--ssd", required=True, help="a directory on the SSD: for the checkpoint, and states on SSD")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--start-repeats", type=int, default=4)
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--dram", default="100GiB")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", default="", help="only the steps whose name holds this, such as 'batch 32'")
    parser.add_argument("--no-starts", action="store_true", help="leave out the start")
    parser.add_argument("--no-ssd-steps", action="store_true", help="leave out steps with states on SSD")
    parser.add_argument("--budget-s", type=float, default=550)
    parser.add_argument("--json")
    return parser.parse_args(arguments)


def build_native(tree: Path) -> None:
    """Build the native code as `pip install -e` does; whatever is installed already stays what it
    is."""
    for package in NATIVE:
        spec = importlib.util.spec_from_file_location(f"{package}_build", tree / package / "build.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.build(tree / package / "_lib")


def environment(tree: Path, root: Path, name: str) -> dict[str, str]:
    caches = root / f"cache-{name}"
    return {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(caches), "TRITON_CACHE_DIR": str(caches / "triton")}


def budgets(args: argparse.Namespace, dram: str | None = None) -> list[str]:
    return ["--dram", dram or args.dram, *([] if args.device == "cpu" else ["--gpu-memory", args.gpu_memory])]


def run_steps(args: argparse.Namespace, tree: Path, env: dict[str, str], flags: list[str], limit_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "ratel", "bench", "step", "--model", args.model, "--seq-len", str(args.seq_len), "--steps", "6",
               "--device", args.device, "--json", *flags]
    try:
        done = subprocess.run(command, cwd=tree, env={**os.environ, **env}, capture_output=True, text=True, timeout=max(limit_s, 1))
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {limit_s:.0f} s"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:500] if done.stderr.strip() else f"exit status {done.returncode}"}
    result = json.loads(done.stdout)
    return {key: result[key] for key in ("step_s", "all_steps_s", "bound_s", "bound_by", "losses", "grad_norms", "units_on_gpu")}


def run_start(args: argparse.Namespace, model: Path, out: Path, env: dict[str, str], limit_s: float) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "ratel", "train", "--model", str(model), "--out", str(out), "--steps", "3", "--batch-size", "8",
               "--seq-len", str(args.seq_len), "--device", args.device, *budgets(args), "--eval-fraction", "0", "--no-export"]
    return time_run(command, out, env, limit_s)


def summarize(points: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The median of each checkout over its processes, and their ratio, by case."""
    table: dict[str, Any] = {}
    for case in dict.fromkeys(point["name"] for point in points if key in point):
        found = {tree: [p[key] for p in points if p["name"] == case and p["tree"] == tree and key in p] for tree in ("before", "after")}
        if all(found.values()):
            before, after = (statistics.median(found[tree]) for tree in ("before", "after"))
            table[case] = {"before_s": before, "after_s": after, "ratio": after / before, "before_all_s": found["before"],
                           "after_all_s": found["after"]}
    return table


def measure(args: argparse.Namespace) -> Report:
    clock, root = Clock(args.budget_s), Path(args.ssd) / "ratel-before-after"
    trees = {"before": args.before.resolve(), "after": ROOT}
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    report = Report(args.json, kind="change", gpu=gpu, torch=torch.__version__, before_commit=args.before_commit)
    shutil.rmtree(root, ignore_errors=True)
    try:
        (root / "model").mkdir(parents=True)
        for tree in trees.values():
            build_native(tree)
        envs = {name: environment(tree, root, name) for name, tree in trees.items()}
        if not args.no_starts:
            measure_starts(args, report, clock, root, envs)
        measure_steps(args, report, clock, root, trees, envs)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    report.write(starts=summarize(report.points, "first_step_end_s"), steps=summarize(report.points, "step_s"))
    return report


def add(report: Report, clock: Clock, case: str, tree: str, run: Any) -> None:
    result = {"error": NOT_BEGUN} if clock.left_s < 5 else run(min(LIMIT_S, clock.left_s))
    report.add({"name": case, "tree": tree, **result})
    print(case, tree, result.get("step_s") or result.get("first_step_end_s") or result.get("error"), flush=True)


def measure_starts(args: argparse.Namespace, report: Report, clock: Clock, root: Path, envs: dict[str, dict[str, str]]) -> None:
    write_checkpoint(read_model(args.start_model), root / "model")
    for number in range(args.start_repeats + 1):
        for name in in_turn(number):
            case = "start, known machine" if number else "start, first"
            add(report, clock, case, name, lambda limit_s: run_start(args, root / "model", root / "out", envs[name], limit_s))
    shutil.rmtree(root / "model")


def measure_steps(args: argparse.Namespace, report: Report, clock: Clock, root: Path, trees: dict[str, Path],
                  envs: dict[str, dict[str, str]]) -> None:
    states = root / "states"
    cases = {case: [*flags, *budgets(args)] for case, flags in STEP_CASES.items()}
    if not args.no_ssd_steps:
        cases["batch 8, states on SSD"] = ["--batch-size", "8", "--max-grad-norm", "1e9", "--ssd", str(states), *budgets(args, "16GiB")]
    for case, flags in cases.items():
        if args.cases not in case:
            continue
        for number in range(1 if "SSD" in case else args.repeats):
            for name in in_turn(number):
                shutil.rmtree(states, ignore_errors=True)
                add(report, clock, case, name, lambda limit_s: run_steps(args, trees[name], envs[name], flags, limit_s))


def in_turn(number: int) -> tuple[str, str]:
    """Neither checkout is always the second, which finds a warmer machine."""
    return ("before", "after") if number % 2 == 0 else ("after", "before")


def main() -> None:
    from benchmarks.tables.target_tables import target_lines

    print("\n".join(target_lines("change", measure(parse()).content)))


if __name__ == "__main__":
    main()
