"""Steps that train an adapter: Ratel's, the frozen model's and plain PyTorch's, in one run.

    python -m benchmarks.speed.lora --model llama-3b --json benchmarks/results/MACHINE_lora_steps.json

Rank 16 on all linears, alpha 32. The frozen model's step is forward and backward to the inputs, with
each layer run twice (checkpointing), as Ratel runs it; plain PyTorch has all in GPU memory without a
limit. Every system is a process of its own.
"""

import argparse
from dataclasses import replace
from typing import Any

import torch

from benchmarks.harness.jobs import run_within
from benchmarks.harness.report import Clock, Report
from benchmarks.harness.systems import Job, read_model

RANK, ALPHA, DROPOUT = 16, 32, 0.1


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3b", help="preset, or a configuration as JSON")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--gpu-memory", default="24GiB", help="of Ratel")
    parser.add_argument("--small-gpu-memory", help="Ratel once more, in so much")
    parser.add_argument("--dram", default="100GiB")
    parser.add_argument("--ssd", help="a directory, for a base that lies partly on SSD")
    parser.add_argument("--only", nargs="+", help="systems by name")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--budget-s", type=float, default=550)
    parser.add_argument("--limit-s", type=float, default=200, help="of one system")
    parser.add_argument("--json")
    return parser.parse_args(arguments)


def jobs(args: argparse.Namespace) -> dict[str, Job]:
    """By the system's name in tables, in the order of what one wants to know first."""
    base = Job(system="ratel", model=read_model(args.model), batches=tuple(args.batch), seq_len=args.seq_len, warmup=args.warmup,
               steps=args.steps, device=args.device, dtype=args.dtype)
    adapter = {"lora": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT}
    ours = {"dram": args.dram, **adapter, **({"ssd": [args.ssd]} if args.ssd else {})}
    found = {
        "ratel": replace(base, gpu_memory=args.gpu_memory, options=ours),
        "frozen": replace(base, system="frozen"),
        "ratel, compiled": replace(base, gpu_memory=args.gpu_memory, options={**ours, "compile": "on"}),
        "plain": replace(base, system="plain", options={"rank": RANK, "alpha": ALPHA, "dropout": DROPOUT}),
        "ratel, no limit": replace(base, options=ours),
        "plain, without checkpointing": replace(base, system="plain", options={"checkpointing": False}),
        "plain, compiled": replace(base, system="plain", options={"compile": True}),
        "plain, compiled, without checkpointing": replace(base, system="plain", options={"compile": True, "checkpointing": False}),
        "frozen, without checkpointing": replace(base, system="frozen", options={"checkpointing": False}),
    }
    if args.small_gpu_memory:
        found["ratel, small"] = replace(base, gpu_memory=args.small_gpu_memory, options=ours)
    return {name: job for name, job in found.items() if not args.only or name in args.only}


def main() -> None:
    args = parse()
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    report, clock = Report(args.json, gpu=gpu, torch=torch.__version__, model=args.model, rank=RANK, dropout=DROPOUT), Clock(args.budget_s)
    for name, job in jobs(args).items():
        for result in run_within(clock, job, args.limit_s):
            report.add({"name": name, "gpu_memory": job.gpu_memory, **result})
            print(line(name, result), flush=True)
    report.write()


def line(name: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"| {name} | {result['batch_size']} | {result['error'][:200]} |"
    peak = result.get("gpu_peak_bytes") or result.get("gpu_reserved_bytes") or 0
    return f"| {name} | {result['batch_size']} | {result['step_s']:.3f} s | {result['tokens_per_s']:,.0f} tok/s | {peak / 2**30:.0f} GiB |"


if __name__ == "__main__":
    main()
