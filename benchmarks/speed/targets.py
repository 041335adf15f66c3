"""How near whole steps come to what the machine allows, in the situations that the project promises
something for.

    python -m benchmarks.speed.targets ssd --ssd /mnt/a --ram-disk /dev/shm/a --json benchmarks/results/MACHINE_ssd.json
    python -m benchmarks.speed.targets dram47 --ssd /mnt/a --compare ...MACHINE_compare.json --json ...MACHINE_dram47.json
    python -m benchmarks.speed.targets curve --json ...MACHINE_curve.json
    python -m benchmarks.speed.targets shapes --ssd /mnt/a --json ...MACHINE_shapes.json
    python -m benchmarks.speed.targets sustained --json ...MACHINE_sustained.json

*ssd*: states on SSD, against the bytes of a step over the rate of a plain O_DIRECT loop just before
and after; also with the disk slowed down, and with a RAM disk slowed down to what faster disks do.
*dram47*: with the DRAM that ZeRO-Infinity took. *curve*: tokens/s over batch sizes beside the
prediction. *shapes*: other models and mixes of tiers. *sustained*: many steps, twice: drift of time
and memory, equal losses. Points that the time budget (--budget-s) leaves no time for are in the
results with that as their error. A second call with the same file adds to it (--only: cases by
their number).
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.disk_rate import mixed_bps
from benchmarks.harness.jobs import RunJob, emptied, run_job, run_within
from benchmarks.harness.report import Clock, Report
from benchmarks.harness.systems import NEVER, Job, read_model
from ratel.units import parse_rate


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job and what to call it."""

    name: str
    job: Job
    limit_s: float
    folder: str | None = None
    """Where states on SSD go; emptied before and removed afterwards."""
    cap_bps: float | None = None
    measure_disk: bool = False


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--model", default="llama-3b", help="preset, or a configuration as JSON (all but shapes)")
    parser.add_argument("--batch", type=int, nargs="+", help="(default: 8; curve: 1 to 64)")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, help="that count (default: 3; sustained: 200)")
    parser.add_argument("--again", type=int, default=50, help="sustained: steps of the second run")
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--dram", help="(default: 100GiB; ssd: 16GiB; dram47: 47GiB)")
    parser.add_argument("--ssd", help="a directory on the SSD")
    parser.add_argument("--ram-disk", help="ssd: a directory on a RAM disk")
    parser.add_argument("--probe-bytes", type=int, default=4 << 30, help="ssd: of the loop that measures the disk")
    parser.add_argument("--compare", help="dram47: results of compare_deepspeed.py on this machine")
    parser.add_argument("--only", type=int, nargs="*", help="cases by their number")
    parser.add_argument("--budget-s", type=float, default=1500)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--json")
    args = parser.parse_args(arguments)
    if args.kind in ("ssd", "dram47", "shapes") and args.ssd is None:
        parser.error("--ssd DIR is needed")
    return args


def ratel_job(args: argparse.Namespace, model: Any = None, *, batches: tuple[int, ...] | None = None, warmup: int = 2,
              dram: str = "100GiB", **options: Any) -> Job:
    return Job(system="ratel", model=model or read_model(args.model), batches=batches or tuple(args.batch or (8,)), seq_len=args.seq_len,
               warmup=warmup, steps=args.steps or 3, clip=NEVER, device=args.device, dtype=args.dtype,
               gpu_memory=args.gpu_memory, options={"dram": args.dram or dram, **options})


def ssd_cases(args: argparse.Namespace) -> Iterator[Case]:
    """The first two steps of a session find planes in DRAM that later ones do not, so three do not
    count."""
    places = [("disk", args.ssd, None), ("RAM disk", args.ram_disk, "3.2GB/s"), ("RAM disk", args.ram_disk, "6.4GB/s"),
              ("disk", args.ssd, "0.8GB/s")]
    for name, directory, cap in places:
        folder = None if directory is None else str(Path(directory) / "ratel-targets")
        more = {} if cap is None else {"ssd_bandwidth": cap}
        yield Case(name=f"{name}, {cap or 'as it is'}", limit_s=300, folder=folder, measure_disk=True,
                   cap_bps=None if cap is None else parse_rate(cap),
                   job=ratel_job(args, dram="16GiB", warmup=3, ssd=[folder], **more))


def dram47_cases(args: argparse.Namespace) -> Iterator[Case]:
    folder = str(Path(args.ssd) / "ratel-targets")
    yield Case(name="47 GiB of DRAM", limit_s=300, folder=folder, measure_disk=True,
               job=ratel_job(args, dram="47GiB", warmup=3, ssd=[folder]))


def curve_cases(args: argparse.Namespace) -> Iterator[Case]:
    """One process: what it needs to begin would be most of the time otherwise."""
    batches = tuple(args.batch or (8, 1, 32, 64, 16, 2, 4, 48))
    yield Case(name="curve", limit_s=600, job=ratel_job(args, batches=batches))


def shapes_cases(args: argparse.Namespace) -> Iterator[Case]:
    folder = str(Path(args.ssd) / "ratel-targets")
    moe = {"name": "qwen3-30b-a3b", "num_blocks": 8}
    batches = tuple(args.batch or (32, 8))  # at 8 the CPU optimizer is as long as the passes, and few updates can be made early
    yield Case(name="llama-8b in DRAM", limit_s=300, job=ratel_job(args, "llama-8b", batches=batches, dram="108GiB"))
    yield Case(name="mixture of experts in DRAM", limit_s=300, job=ratel_job(args, moe, batches=batches))
    yield Case(name="llama-8b in DRAM and on SSD", limit_s=400, folder=folder,
               job=ratel_job(args, "llama-8b", batches=batches[:1], dram="96GiB", warmup=3, ssd=[folder]))  # 10 s of a disk
    yield Case(name="llama-3b without clipping", limit_s=120, job=ratel_job(args, "llama-3b", max_grad_norm=0.0))


def sustained_cases(args: argparse.Namespace) -> Iterator[Case]:
    for steps in (args.steps or 200, args.again):
        args.steps = steps
        yield Case(name=f"{steps} steps", limit_s=900, job=ratel_job(args))


KINDS: dict[str, Callable[[argparse.Namespace], Iterator[Case]]] = {
    "ssd": ssd_cases, "dram47": dram47_cases, "curve": curve_cases, "shapes": shapes_cases,
    "sustained": sustained_cases}


def run_case(case: Case, args: argparse.Namespace, clock: Clock, runner: RunJob) -> Iterator[dict[str, Any]]:
    facts: dict[str, Any] = {"name": case.name, "options": case.job.options, "warmup": case.job.warmup,
                             "cap_bps": case.cap_bps}
    if case.measure_disk and case.folder is None:
        yield {"batch_size": case.job.batches[0], "error": "not begun: no --ram-disk was given", **facts}
        return
    if case.folder:
        emptied(case.folder)
    if case.measure_disk:
        facts["disk_bps"] = [mixed_bps(case.folder, args.probe_bytes)]
        emptied(case.folder)
    job = case.job
    if facts.get("disk_bps") == [None]:  # nor could a session measure it to plan with
        job = replace(job, options={**job.options, "hardware": "none"})
    results = run_within(clock, job, case.limit_s, runner)
    if case.measure_disk:
        facts["disk_bps"].append(mixed_bps(emptied(case.folder), args.probe_bytes))
    if case.folder:
        shutil.rmtree(case.folder, ignore_errors=True)
    yield from ({**result, **facts} for result in results)


def infinity(path: str | None) -> dict[str, Any]:
    """Step seconds of ZeRO-Infinity as compare_deepspeed.py measured them, and where that was."""
    if path is None or not Path(path).exists():
        return {"infinity_s": None, "infinity_from": None}
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    seconds = sorted(p["step_s"] for p in report["points"] if p["name"] == "ZeRO-Infinity" and "step_s" in p)
    return {"infinity_s": seconds[len(seconds) // 2] if seconds else None, "infinity_from": Path(path).name}


def measure(args: argparse.Namespace, runner: RunJob = run_job) -> Report:
    clock = Clock(args.budget_s)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    facts = infinity(args.compare) if args.kind == "dram47" else {}
    report = Report(args.json, kind=args.kind, gpu=gpu, torch=torch.__version__, **facts)
    for number, case in enumerate(KINDS[args.kind](args)):
        if args.only and number not in args.only:
            continue
        for point in run_case(case, args, clock, runner):
            report.add(point)
            said = point.get("error") or f"{point['step_s']:.3f} s/step, {point['fraction_of_bound']:.0%} of the bound"
            print(f"{case.name}, batch {point['batch_size']}: {said}", flush=True)
    return report


def main() -> None:
    from benchmarks.tables.target_tables import target_lines

    args = parse()
    report = measure(args)
    print("\n".join(target_lines(args.kind, report.content)))


if __name__ == "__main__":
    main()
