"""Which kernels a step's GPU time goes to, and how long the GPU does nothing: torch's profiler over
one step.

    python -m benchmarks.parts.gpu_kernels --model llama-3b --batch 32 --gpu-memory 24GiB --json kernels.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ratel.planner.report.plan_text import describe_plan
from ratel.planner.report.utilization import busy_seconds
from ratel.runtime.session.session import Session
from ratel.trace.timeline import Span
from ratel.training.bench.step import random_tokens, use_quick_weights


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3b")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--dram", default=None)
    parser.add_argument("--micro-batch", default="auto", type=lambda text: text if text == "auto" else int(text))
    parser.add_argument("--compile", default="off", choices=["off", "on"])
    parser.add_argument("--top", type=int, default=30)
    parser.add_argument("--json")
    return parser.parse_args()


def kernel_spans(profiler: profile) -> list[Span]:
    """The spans of all kernels but copies between memories."""
    return [Span(lane="compute", name=e.name, begin_s=e.time_range.start / 1e6, end_s=e.time_range.end / 1e6)
            for e in profiler.events()
            if e.device_type == DeviceType.CUDA and not e.name.startswith(("Memcpy HtoD", "Memcpy DtoH"))]


def summarize(profiler: profile, seconds: float, top: int) -> dict[str, Any]:
    spans = kernel_spans(profiler)
    by_name: dict[str, list[float]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span.end_s - span.begin_s)
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]
    return {"step_s": seconds, "busy_s": busy_seconds(spans, float("inf")), "kernels": len(spans),
            "top": [{"name": name[:140], "ms": sum(times) * 1e3, "count": len(times)} for name, times in ranked]}


def main() -> None:
    args = parse()
    with Session(args.model, gpu_memory=args.gpu_memory, dram=args.dram, max_grad_norm=1e9, compile=args.compile,
                 micro_batch=args.micro_batch) as session:
        use_quick_weights(session)
        print(describe_plan(session.prepare(args.batch, args.seq_len)))
        batch = {"input_ids": random_tokens(0, args.batch, args.seq_len, session.parts.spec.vocab_size)}
        for _ in range(3):
            seconds = session.step(batch).seconds
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            session.step(batch)
            torch.cuda.synchronize()
    result = summarize(profiler, seconds, args.top)
    print(f"step {result['step_s']:.3f} s, GPU busy {result['busy_s']:.3f} s in {result['kernels']} kernels")
    for row in result["top"]:
        print(f"{row['ms']:9.1f} ms {row['count']:6d}  {row['name']}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
