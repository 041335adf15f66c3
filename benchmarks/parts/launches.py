"""What the CPU does for each block and micro-batch of a step: its Python and its launches, without
the GPU's work.

    python -m benchmarks.parts.launches --device cuda --json launches.json

A model so narrow that its kernels take next to no time, as Hugging Face runs it and as Ratel does.
On a CPU device the kernels are in the times. The fastest of all rounds counts: what else the
machine does only adds.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.harness.report import Report
from transformers import LlamaConfig, LlamaForCausalLM

from ratel.runtime.session.session import Session
from ratel.training.bench.step import random_tokens, use_quick_weights

VOCAB, ROWS, POSITIONS = 512, 2, 16

RATEL = {
    "weights stay, insides made again": dict(tier="gpu", activations="recompute"),
    "weights stay, insides kept": dict(tier="gpu", activations="gpu"),
    "weights in DRAM, insides made again": dict(tier="dram", activations="recompute"),
    "weights in DRAM, insides kept there": dict(tier="dram", activations="dram"),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--micro-batches", type=int, default=4, help="in a step of Ratel's")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json")
    return parser.parse_args()


def config_of(blocks: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=blocks, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=VOCAB, tie_word_embeddings=False, use_cache=False)


def hugging_face(args: argparse.Namespace) -> Iterator[tuple[str, float]]:
    model = LlamaForCausalLM(config_of(args.blocks)).to(args.device, torch.bfloat16).train()
    ids = random_tokens(0, ROWS, POSITIONS, VOCAB).to(args.device)

    def forward() -> None:
        with torch.no_grad():
            model.model(ids)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    yield "forward", fastest(forward, args)
    yield "forward, backward", fastest(step, args)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    yield "forward, forward again, backward", fastest(step, args)


def ratel(args: argparse.Namespace, options: dict[str, Any]) -> tuple[float, list[float] | None]:
    """Seconds of a step; and of launching one visit, forward and backward, as the planner has
    measured it of a block alone."""
    ids = random_tokens(0, ROWS * args.micro_batches, POSITIONS, VOCAB)
    with Session(config_of(args.blocks), device=args.device, dtype="bf16", micro_batch=ROWS, optimizer="deferred",
                 optimizer_threads=1, max_grad_norm=1e9, **options) as session:
        use_quick_weights(session)
        session.prepare(len(ids), POSITIONS)
        launch_s = session.plan.profiles[0].launch_s if session.plan.profiles else ()
        alone = list(launch_s[bool(session.plan.kept and session.plan.kept[0])]) if launch_s else None
        return fastest(lambda: session.step({"input_ids": ids}), args), alone


def fastest(action: Callable[[], object], args: argparse.Namespace) -> float:
    """Seconds of the fastest round, the device's work awaited."""
    found = []
    for _ in range(2 + args.rounds):
        begin = time.perf_counter()
        action()
        if args.device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found[2:])


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    report = Report(args.json, kind="launches", torch=torch.__version__, device=args.device,
                    gpu=torch.cuda.get_device_name() if args.device == "cuda" else None)

    def add(name: str, seconds: float, visits: int, alone: list[float] | None = None) -> None:
        report.add({"name": name, "visit_s": seconds / visits, "planned_s": alone})
        planned = "" if alone is None else f", planned with {sum(alone) * 1e3:.2f}"
        print(f"{seconds / visits * 1e3:7.2f} ms per block and micro-batch{planned}  {name}", flush=True)

    for name, seconds in hugging_face(args):
        add(f"Hugging Face: {name}", seconds, args.blocks)
    for name, options in RATEL.items():
        seconds, alone = ratel(args, options)
        add(f"Ratel: {name}", seconds, args.blocks * args.micro_batches, alone)


if __name__ == "__main__":
    main()
