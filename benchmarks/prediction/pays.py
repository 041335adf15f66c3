"""Whether planning pays: planned steps against fixed rules, on cases where no fixed rule is right.

    python -m benchmarks.prediction.pays --set gpu --ssd /mnt/a --json results.json

*activations*: the insides of all blocks recomputed, all moved to DRAM, or what the planner chooses.
With sequences of 8192 tokens attention is worth its bytes, and what the products make is not: a
part should move, and all else is planned alike (blocks of 1024 channels are launched no faster than
they are computed there; docs/log.md). *tiers*: the simple rule (GPU, then DRAM, then SSD, hottest
planes first; insides recomputed) against the planner, on three budgets: one that leaves states on
SSD, one whose updates do not hide under a small batch, one with memory to spare for activations.

Every result says what the step was predicted to take, at the rates that were probed before.
Clipping is on and does not fire.
"""

import argparse
import gc
import statistics
import traceback
from pathlib import Path
from typing import Any

import torch

from ratel.hardware.probe import probe
from ratel.planner.forecast.cost import predict
from ratel.planner.machine.hardware import with_cap
from ratel.runtime.session.session import Session
from ratel.training.bench.step import use_quick_weights
from ratel.units import parse_rate

from benchmarks.prediction.reality import make_config, take_step
from benchmarks.harness.report import Report
from benchmarks.harness.systems import NEVER

CASES: dict[str, list[dict[str, Any]]] = {
    "gpu": [
        dict(name="activations", model=(2048, 24), batch=32, seq=1024, options=dict(gpu_memory="12GiB", tier="dram"),
             ways={"all recomputed": dict(activations="recompute", hardware="none"),
                   "all moved to DRAM": dict(activations="dram", hardware="none"), "planned": {}}),
        dict(name="activations, long sequences", model=(2048, 16), batch=12, seq=8192, options=dict(gpu_memory="8GiB", tier="dram"),
             ways={"all recomputed": dict(activations="recompute"), "all moved to DRAM": dict(activations="dram"),
                   "planned": {}}),
        dict(name="tiers, 40 GiB DRAM", model=(3072, 28), batch=8, seq=1024, options=dict(gpu_memory="24GiB", dram="40GiB"),
             ways={"simple rule": dict(hardware="none"), "planned": {}}),
        dict(name="tiers, 80 GiB DRAM", model=(3072, 28), batch=32, seq=1024, options=dict(gpu_memory="24GiB", dram="80GiB"),
             ways={"simple rule": dict(hardware="none"), "planned": {}}),
        dict(name="tiers, 12 GiB DRAM", model=(2048, 24), batch=16, seq=1024, options=dict(gpu_memory="10GiB", dram="12GiB"),
             ways={"simple rule": dict(hardware="none"), "planned": {}}),
    ],
    "cpu": [
        dict(name="activations", model=(512, 8), batch=8, seq=256, options=dict(tier="dram", ssd_bandwidth="150MB/s"),
             ways={"all recomputed": dict(activations="recompute", hardware="none"),
                   "all moved to SSD": dict(activations="ssd", hardware="none"), "planned": {}}),
        *[dict(name=f"tiers, {dram} DRAM", model=(512, 8), batch=8, seq=128, options=dict(dram=dram, ssd_bandwidth="300MB/s"),
               ways={"simple rule": dict(hardware="none"), "planned": {}}) for dram in ("1500MiB", "1700MiB", "2GiB")],
    ],
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=list(CASES), required=True)
    parser.add_argument("--only", type=int, nargs="*", help="cases by their number")
    parser.add_argument("--ssd", required=True, help="a directory")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json")
    return parser.parse_args()


def run(case: dict[str, Any], way: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    gc.collect()
    cuda = args.set == "gpu"
    with Session(make_config(*case["model"]), device="cuda" if cuda else "cpu", ssd=[args.ssd],
                 **{**case["options"], "max_grad_norm": NEVER, "hardware": args.machine, **way}) as session:
        use_quick_weights(session)
        plan = session.prepare(case["batch"], case["seq"])
        seconds = [take_step(session, case, index).seconds for index in range(args.steps + 2)]
        kept = [tier for block in plan.kept for _, tier in block]
        rate = case["options"].get("ssd_bandwidth")
        capped = with_cap(args.machine, None if rate is None else parse_rate(rate))
        return {"step_s": statistics.median(seconds[2:]), "seconds": seconds,
                "predicted_s": predict(plan, capped).step_s,
                "micro_batches": plan.work.num_micro, "checkpoints": plan.checkpoint_tiers[0],
                "kept": {tier: kept.count(tier) for tier in sorted(set(kept))},
                "offered": sum(len(profile.inner) for profile in plan.profiles),
                "gpu_bytes": plan.gpu_bytes, "dram_bytes": plan.dram_bytes, "ssd_bytes": plan.ssd_bytes}


def main() -> None:
    args = parse()
    Path(args.ssd).mkdir(parents=True, exist_ok=True)
    args.machine = probe(directories=[args.ssd], device="cuda" if args.set == "gpu" else "cpu", refresh=True).hardware
    report = Report(args.json, gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, torch=torch.__version__)
    for number, case in enumerate(CASES[args.set]):
        if args.only and number not in args.only:
            continue
        ways = {}
        for name, way in case["ways"].items():
            try:
                ways[name] = run(case, way, args)
                found = ways[name]
                print(f"{case['name']}: {name}: {found['step_s']:.3f} s, predicted {found['predicted_s']:.3f}; {found}", flush=True)
            except Exception as error:  # noqa: BLE001 - the other cases still count
                traceback.print_exc()
                ways[name] = {"error": str(error)}
        report.add({**case, "ways": ways})


if __name__ == "__main__":
    main()
