"""Whether planning pays: planned steps against fixed rules, on cases where no fixed rule is right.

    python benchmarks/pays.py --set gpu --ssd /mnt/a --json results.json

*activations*: the insides of all blocks recomputed, all moved to DRAM, or what the planner chooses. *tiers*: the simple rule
(GPU, then DRAM, then SSD, hottest planes first; insides recomputed) against the planner, on three budgets.
"""

import argparse
import gc
import json
import statistics
import traceback
from pathlib import Path
from typing import Any

import torch

from ratel.hardware.host import describe_host
from ratel.runtime.session import Session
from ratel.train.step_bench import use_quick_weights

from reality import make_config, step_seconds

CASES: dict[str, list[dict[str, Any]]] = {
    "gpu": [
        dict(name="activations", model=(2048, 24), batch=32, seq=1024, options=dict(gpu_memory="12GiB", tier="dram"),
             ways={"all recomputed": dict(activations="recompute", hardware="none"),
                   "all moved to DRAM": dict(activations="dram", hardware="none"), "planned": {}}),
        dict(name="tiers, 10 GiB GPU, 12 GiB DRAM", model=(2048, 24), batch=16, seq=1024,
             options=dict(gpu_memory="10GiB", dram="12GiB"), ways={"simple rule": dict(hardware="none"), "planned": {}}),
        dict(name="tiers, 24 GiB GPU, 60 GiB DRAM", model=(3072, 28), batch=8, seq=1024,
             options=dict(gpu_memory="24GiB", dram="60GiB"), ways={"simple rule": dict(hardware="none"), "planned": {}}),
        dict(name="tiers, 16 GiB GPU, 60 GiB DRAM", model=(2048, 24), batch=64, seq=1024,
             options=dict(gpu_memory="16GiB", dram="60GiB"), ways={"simple rule": dict(hardware="none"), "planned": {}}),
    ],
    "cpu": [
        dict(name="activations", model=(512, 8), batch=8, seq=256, options=dict(tier="dram", ssd_bandwidth="150MB/s"),
             ways={"all recomputed": dict(activations="recompute", hardware="none"),
                   "all moved to SSD": dict(activations="ssd", hardware="none"), "planned": {}}),
        *[dict(name=f"tiers, {dram} DRAM", model=(512, 8), batch=8, seq=128, options=dict(dram=dram, ssd_bandwidth="300MB/s"),
               ways={"simple rule": dict(hardware="none"), "planned": {}}) for dram in ("1400MiB", "1600MiB", "2GiB")],
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
    machine = {} if cuda or "hardware" in way else {"hardware": args.machine}
    with Session(make_config(*case["model"]), device="cuda" if cuda else "cpu", ssd=[args.ssd],
                 **{**case["options"], **machine, **way}) as session:
        use_quick_weights(session)
        plan = session.prepare(case["batch"], case["seq"])
        seconds = [step_seconds(session, case, index) for index in range(args.steps + 2)]
        kept = [tier for block in plan.kept for _, tier in block]
        return {"step_s": statistics.median(seconds[2:]), "seconds": seconds,
                "predicted_s": session.prediction.step_s if session.prediction else None,
                "micro_batches": plan.work.num_micro, "checkpoints": plan.checkpoint_tiers[0],
                "kept": {tier: kept.count(tier) for tier in sorted(set(kept))},
                "offered": sum(len(profile.inner) for profile in plan.profiles),
                "gpu_bytes": plan.gpu_bytes, "dram_bytes": plan.dram_bytes, "ssd_bytes": plan.ssd_bytes}


def main() -> None:
    args = parse()
    Path(args.ssd).mkdir(parents=True, exist_ok=True)
    if args.set == "cpu":
        from ratel.hardware.probe import probe

        args.machine = probe(directories=[args.ssd], device="cpu", refresh=True).hardware
    results = []
    for number, case in enumerate(CASES[args.set]):
        if args.only and number not in args.only:
            continue
        ways = {}
        for name, way in case["ways"].items():
            try:
                ways[name] = run(case, way, args)
                print(f"{case['name']}: {name}: {ways[name]}", flush=True)
            except Exception as error:  # noqa: BLE001 - the other cases still count
                traceback.print_exc()
                ways[name] = {"error": str(error)}
        results.append({key: value for key, value in case.items() if key != "ways"} | {"ways": ways})
    if args.json:
        report = {"command": f"python benchmarks/pays.py --set {args.set}", "host": describe_host(),
                  "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                  "torch": torch.__version__, "cases": results}
        Path(args.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
