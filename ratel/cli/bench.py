"""``ratel bench``: how near the parts come to what the machine allows. Progress goes to stderr,
results to stdout."""

import argparse
import json
import sys
from typing import Any

from ratel.cli import bench_lora
from ratel.cli.parser import add_command, at_least, directories
from ratel.config import check_can_write
from ratel.errors import RatelError
from ratel.units import MIB, format_bytes, parse_bytes

_SIZE_STEP_BYTES = 64 * MIB


def add(commands: Any) -> None:
    parser = add_command(commands, "bench", "measure the parts against what the machine allows")
    parts = parser.add_subparsers(title="parts", metavar="PART", dest="part", required=True)
    _add_io(parts)
    _add_adam(parts)
    _add_step(parts)
    _add_max(parts, "max-model", "the deepest model of a width that fits each limit on DRAM, really trained")
    _add_max(parts, "max-batch", "the most sequences per step that fit each limit on DRAM, really trained")
    bench_lora.add(parts)


def _add_io(parts: Any) -> None:
    parser = add_command(parts, "io", "the I/O engine against a plain O_DIRECT loop on the same directories", _io)
    parser.add_argument("--ssd", metavar="DIR[,DIR]", type=directories, required=True, help="directories to measure")
    parser.add_argument("--size", default="1GiB", help="bytes moved per pattern, repeat and directory (default: 1GiB)")
    parser.add_argument("--io-backend", choices=["auto", "io_uring", "threads"], default="auto")
    parser.add_argument("--queue-depth", type=at_least(1), default=32, metavar="N", help="requests in flight (default: 32)")
    parser.add_argument("--repeats", type=at_least(1), default=3, metavar="N", help="the median counts (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_adam(parts: Any) -> None:
    parser = add_command(parts, "adam", "the CPU optimizer against torch's and against the memory's bandwidth", _adam)
    parser.add_argument("--params", type=at_least(1), default=1 << 25, metavar="N", help="parameters (default: 33554432)")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="threads (default: all cores)")
    parser.add_argument("--isa", choices=["auto", "scalar", "avx2", "avx512"], default="auto", help="instruction set")
    parser.add_argument("--repeats", type=at_least(1), default=7, metavar="N", help="the median counts (default: 7)")
    parser.add_argument("--no-torch", action="store_true", help="leave torch's optimizer out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_step(parts: Any) -> None:
    parser = add_command(parts, "step", "whole training steps: seconds, and what bound them", _step)
    parser.add_argument("--model", default="demo", metavar="DIR|PRESET", help="what to train (default: demo)")
    parser.add_argument("--batch-size", type=at_least(1), default=8, metavar="N", help="sequences per step (default: 8)")
    parser.add_argument("--seq-len", type=at_least(1), default=256, metavar="N", help="tokens per sequence (default: 256)")
    parser.add_argument("--steps", type=at_least(1), default=4, metavar="N", help="steps that count (default: 4)")
    parser.add_argument("--warmup", type=at_least(0), default=2, metavar="N", help="steps before them (default: 2)")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, metavar="X", help="clip here (default: 1.0)")
    parser.add_argument("--ssd", metavar="DIR[,DIR]", type=directories, default=[], help="directories for states")
    for flag, choices in (("device", ["auto", "cuda", "cpu"]), ("tier", ["auto", "gpu", "dram", "ssd"]),
                          ("checkpoint-tier", ["auto", "gpu", "dram", "ssd"]),
                          ("activations", ["auto", "recompute", "spill", "gpu", "dram", "ssd"]), ("dtype", ["bf16", "fp32"]),
                          ("optimizer", ["auto", "eager", "deferred", "speculative"]),
                          ("compile", ["off", "on"])):
        parser.add_argument(f"--{flag}", choices=choices, default=choices[0])
    parser.add_argument("--deterministic", action="store_true", help="use only kernels that give the same bits every time")
    parser.add_argument("--trace", metavar="FILE", help="write what every resource and thread did in the last step, for Perfetto")
    for flag in ("gpu-memory", "dram", "ssd-bandwidth"):
        parser.add_argument(f"--{flag}", metavar="SIZE" if flag != "ssd-bandwidth" else "RATE")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_max(parts: Any, name: str, text: str) -> None:
    parser = add_command(parts, name, text, _max)
    parser.add_argument("--model", default="demo", metavar="PRESET", help="whose blocks (default: demo)")
    parser.add_argument("--dram", required=True, metavar="SIZE[,SIZE]", help="limits to try, such as 16GiB,32GiB")
    parser.add_argument("--batch-size", type=at_least(1), default=1, metavar="N", help="max-model: sequences per step (default: 1)")
    parser.add_argument("--seq-len", type=at_least(1), default=256, metavar="N", help="tokens per sequence (default: 256)")
    parser.add_argument("--steps", type=at_least(1), default=3, metavar="N", help="steps at each maximum (default: 3)")
    parser.add_argument("--most", type=at_least(1), default=4096, metavar="N", help="where the search ends (default: 4096)")
    parser.add_argument("--ssd", metavar="DIR[,DIR]", type=directories, default=[], help="directories for states")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--gpu-memory", metavar="SIZE")
    parser.add_argument("--hardware", default="auto", metavar="auto|none|NAME|FILE", help="rates to plan with")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _max(args: argparse.Namespace) -> None:
    from ratel.training.bench import largest as max_bench

    limits = [parse_bytes(text, field="--dram") for text in args.dram.split(",")]
    bench = max_bench.MaxBench(model=args.model, batch_size=args.batch_size, seq_len=args.seq_len, steps=args.steps,
                               most=args.most, options={"ssd": list(args.ssd) or None, "device": args.device,
                                                        "gpu_memory": args.gpu_memory, "hardware": args.hardware})
    search = max_bench.max_model if args.part == "max-model" else max_bench.max_batch
    results = search(bench, limits, progress=lambda text: print(text, file=sys.stderr))
    print(json.dumps(results, indent=2) if args.json else max_bench.table(results))


def _step(args: argparse.Namespace) -> None:
    from ratel.hardware.determinism import same_bits
    from ratel.training.bench.step import StepBench, details, measure, table

    check_can_write(args.trace, "--trace")
    names = ("device", "tier", "checkpoint_tier", "activations", "dtype", "optimizer", "gpu_memory", "dram", "ssd_bandwidth",
             "max_grad_norm", "compile")
    bench = StepBench(model=args.model, batch_size=args.batch_size, seq_len=args.seq_len, warmup=args.warmup,
                      steps=args.steps, trace=args.trace,
                      options={"ssd": list(args.ssd) or None, **{n: getattr(args, n) for n in names}})
    with same_bits(args.deterministic):
        result = measure(bench, progress=lambda text: print(text, file=sys.stderr))
    print(json.dumps(result, indent=2) if args.json else f"{table([result])}\n\n{details(result)}")


def _io(args: argparse.Namespace) -> None:
    from nvme_ds import bench
    from ratel.hardware.doctor import existing

    num_bytes = parse_bytes(args.size, field="--size")
    if num_bytes == 0 or num_bytes % _SIZE_STEP_BYTES:
        raise RatelError(f"is not a multiple of {format_bytes(_SIZE_STEP_BYTES)}", field="--size", value=args.size)
    directories = tuple(map(existing, args.ssd))
    try:
        spec = bench.IoBenchSpec(directories=directories, num_bytes=num_bytes, file_bytes=num_bytes,
                                 backend=args.io_backend, queue_depth=args.queue_depth, repeats=args.repeats)
        result = bench.measure(spec, progress=lambda text: print(text, file=sys.stderr))
    except (OSError, ValueError) as error:
        raise RatelError(str(error), field="bench io", value=",".join(args.ssd)) from error
    print(json.dumps(result, indent=2) if args.json else bench.table(result))


def _adam(args: argparse.Namespace) -> None:
    from op_ds import bench

    torch = None
    if not args.no_torch:
        import torch
    try:
        report = bench.measure(num_params=args.params, num_threads=args.threads, repeats=args.repeats, isa=args.isa,
                               torch=torch)
    except ValueError as error:
        raise RatelError(str(error), field="bench adam") from error
    print(json.dumps(report, indent=2) if args.json else bench.describe(report))
