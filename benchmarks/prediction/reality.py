"""Predicted against measured: step seconds and peak memory of configurations that are unlike each
other.

    python -m benchmarks.prediction.reality --set gpu --ssd /mnt/a --json results.json
    python -m benchmarks.prediction.reality --set cpu --ssd /tmp/a --json results.json

The machine is probed first; each configuration is then planned, predicted from the probe, and
trained for a few steps. Norms are clipped at what no gradient has, so that clipping is on and does
nothing, unless the name says something else.
"""

import argparse
import gc
import json
import statistics
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.report import origin
from benchmarks.harness.systems import ALWAYS, NEVER
from ratel.hardware.host import describe_host
from ratel.hardware.probe import probe
from ratel.memory.resident import peak_bytes, reset_peak
from ratel.planner.forecast.cost import predict
from ratel.planner.forecast.simulate import simulate
from ratel.planner.machine.hardware import Hardware, with_cap
from ratel.runtime.session.result import StepResult
from ratel.runtime.session.session import Session
from ratel.training.bench.step import random_tokens, use_quick_weights
from ratel.units import parse_rate

OFF = dict(max_grad_norm=0.0)
HALF = {"*": "dram", "block.*": {"m": "ssd", "v": "ssd"}}
CONFIGURATIONS: dict[str, list[dict[str, Any]]] = {
    # model (hidden, layers), batch, sequence, and what the session is given beside
    "gpu": [
        dict(name="3 B, DRAM, batch 8", model=(3072, 28), batch=8, seq=1024),
        dict(name="3 B, DRAM, batch 8, always clipped", model=(3072, 28), batch=8, seq=1024, max_grad_norm=ALWAYS),
        dict(name="3 B, DRAM, batch 32", model=(3072, 28), batch=32, seq=1024),
        dict(name="3 B, DRAM, batch 32, micro-batches of 4", model=(3072, 28), batch=32, seq=1024, micro_batch=4),
        dict(name="3 B, DRAM, 12 GiB of GPU memory", model=(3072, 28), batch=8, seq=1024, gpu_memory="12GiB"),
        dict(name="3 B, DRAM, no clipping", model=(3072, 28), batch=8, seq=1024, **OFF),
        dict(name="3 B, DRAM, 4 x 4096 tokens", model=(3072, 28), batch=4, seq=4096),
        dict(name="0.7 B, all in GPU memory", model=(2048, 12), batch=8, seq=1024, tier="gpu"),
        dict(name="0.7 B, all in DRAM", model=(2048, 12), batch=8, seq=1024, tier="dram"),
        dict(name="0.7 B, all on SSD", model=(2048, 12), batch=8, seq=1024, tier="ssd"),
        dict(name="0.7 B, moments on SSD", model=(2048, 12), batch=8, seq=1024, placement=HALF),
        dict(name="0.7 B, all on SSD, no clipping", model=(2048, 12), batch=8, seq=1024, tier="ssd", **OFF),
        dict(name="0.7 B, moments on SSD, 1 GB/s", model=(2048, 12), batch=8, seq=1024, placement=HALF,
             ssd_bandwidth="1GB/s"),
        dict(name="0.7 B, DRAM, 64 x 1024 tokens", model=(2048, 12), batch=64, seq=1024, tier="dram"),
        dict(name="0.7 B, DRAM, insides of blocks kept in DRAM", model=(2048, 12), batch=16, seq=1024, tier="dram",
             activations="dram"),
        dict(name="0.7 B, DRAM, insides of blocks kept on the GPU", model=(2048, 12), batch=8, seq=1024, tier="dram",
             activations="gpu"),
    ],
    "cpu": [
        dict(name="all in DRAM", model=(512, 8), batch=4, seq=128, tier="dram"),
        dict(name="all in DRAM, no clipping", model=(512, 8), batch=4, seq=128, tier="dram", **OFF),
        dict(name="all in DRAM, micro-batches of 1", model=(512, 8), batch=4, seq=128, tier="dram", micro_batch=1),
        dict(name="2 x 512 tokens", model=(512, 8), batch=2, seq=512, tier="dram"),
        dict(name="all on SSD", model=(512, 8), batch=4, seq=128, tier="ssd"),
        dict(name="all on SSD, no clipping", model=(512, 8), batch=4, seq=128, tier="ssd", **OFF),
        dict(name="moments on SSD", model=(512, 8), batch=4, seq=128, placement=HALF),
        dict(name="all on SSD, 200 MB/s", model=(512, 8), batch=4, seq=128, tier="ssd", ssd_bandwidth="200MB/s"),
        dict(name="all on SSD, 100 MB/s, no clipping", model=(512, 8), batch=4, seq=128, tier="ssd",
             ssd_bandwidth="100MB/s", **OFF),
        dict(name="moments on SSD, 100 MB/s", model=(512, 8), batch=4, seq=128, placement=HALF, ssd_bandwidth="100MB/s"),
        dict(name="wider and shorter", model=(1024, 3), batch=2, seq=128, tier="dram"),
        dict(name="16 x 128 tokens", model=(512, 8), batch=16, seq=128, tier="dram"),
        dict(name="insides of blocks kept", model=(512, 8), batch=4, seq=128, tier="dram", activations="dram"),
    ],
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=list(CONFIGURATIONS), required=True)
    parser.add_argument("--only", type=int, nargs="*", help="configurations by their number")
    parser.add_argument("--ssd", required=True, help="a directory")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json")
    return parser.parse_args()


def make_config(hidden: int, layers: int) -> Any:
    from transformers import LlamaConfig

    # Without rounding 2048 gives 5461: rows of bf16 that begin at odd addresses, as no real model
    # has them.
    wide = -(-hidden * 8 // 3 // 128) * 128
    return LlamaConfig(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
                       num_attention_heads=max(1, hidden // 128), num_key_value_heads=max(1, hidden // 512),
                       vocab_size=32000, tie_word_embeddings=False, max_position_embeddings=1 << 17)


def compare(entry: dict[str, Any], args: argparse.Namespace, machine: Hardware) -> dict[str, Any]:
    given = {key: value for key, value in entry.items() if key not in ("name", "model", "batch", "seq")}
    options = {"max_grad_norm": NEVER, **given}
    cuda = args.set == "gpu"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        options = {"gpu_memory": "24GiB", **options}
    rate = options.get("ssd_bandwidth")
    capped = with_cap(machine, None if rate is None else parse_rate(rate))
    # Without being told, a session on a CPU device plans with no rates, and times no blocks.
    with Session(make_config(*entry["model"]), device="cuda" if cuda else "cpu", ssd=[args.ssd], hardware=machine, **options) as session:
        use_quick_weights(session)
        if cuda:
            reset_peak()  # of the configurations before; the import of weights is in the plan, and in the peak
        plan = session.prepare(entry["batch"], entry["seq"])
        # Trials of blocks come before the plan, and are not in it.
        torch.cuda.reset_peak_memory_stats() if cuda else reset_peak()
        done = plan.while_clipped if options["max_grad_norm"] == ALWAYS else plan
        predicted, simulated = predict(done, capped), simulate(done, capped)
        taken = [take_step(session, entry, index) for index in range(args.warmup + args.steps)][args.warmup :]
    seconds = [step.seconds for step in taken]
    measured_s = statistics.median(seconds)
    busy_s = {name: statistics.median(step.usage.busy_s[name] for step in taken) for name in taken[0].usage.busy_s}
    return {"name": entry["name"], "parameters": plan.spec.num_params, "batch": entry["batch"], "seq_len": entry["seq"],
            "micro_batches": plan.work.num_micro, "optimizer": plan.optimizer, "seconds": seconds,
            "measured_s": measured_s, "predicted_s": predicted.step_s, "simulated_s": simulated.step_s,
            "error": predicted.step_s / measured_s - 1, "bound_by": predicted.bound_by, "busy_s": predicted.busy_s,
            "measured_busy_s": busy_s,
            "gpu_peak_bytes": torch.cuda.max_memory_reserved() if cuda else None, "gpu_planned_bytes": plan.gpu_bytes,
            "dram_peak_bytes": peak_bytes(), "dram_planned_bytes": plan.dram_bytes}


def take_step(session: Session, entry: dict[str, Any], index: int) -> StepResult:
    return session.step({"input_ids": random_tokens(index, entry["batch"], entry["seq"], 32000)})


def main() -> None:
    args = parse()
    Path(args.ssd).mkdir(parents=True, exist_ok=True)
    found = probe(directories=[args.ssd], device="cuda" if args.set == "gpu" else "cpu", refresh=True)
    print(f"probed in {found.seconds:.0f} s: {found.hardware}", flush=True)
    results = []
    for number, entry in enumerate(CONFIGURATIONS[args.set]):
        if args.only and number not in args.only:
            continue
        try:
            results.append(compare(entry, args, found.hardware))
            r = results[-1]
            print(f"{r['name']:48} {r['measured_s']:8.3f} s, predicted {r['predicted_s']:8.3f} ({r['error']:+.0%}), simulated "
                  f"{r['simulated_s']:8.3f}, by {r['bound_by']}; DRAM {r['dram_peak_bytes'] / 2**30:.2f} of "
                  f"{r['dram_planned_bytes'] / 2**30:.2f} GiB, GPU {(r['gpu_peak_bytes'] or 0) / 2**30:.2f} of "
                  f"{r['gpu_planned_bytes'] / 2**30:.2f}", flush=True)
        except Exception as error:  # noqa: BLE001 - the other configurations still count
            traceback.print_exc()
            results.append({"name": entry["name"], "error_text": str(error)})
        if args.json:  # after each, so that a run cut short leaves what it has measured
            _write(args, found.hardware, results)


def _write(args: argparse.Namespace, hardware: Hardware, results: list[dict[str, Any]]) -> None:
    report = {**origin(), "host": describe_host(),
              "torch": torch.__version__, "hardware": hardware.to_json(), "results": results}
    Path(args.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
