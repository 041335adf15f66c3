"""What durability costs a step: checksums, commits in place and background copies, as ratios of one
run's step time.

    python -m benchmarks.speed.durable --layers 12 --ssd /mnt/a --out /mnt/a/out --json results.json

Each way of working trains the same Llama-shaped model with all states on SSD (and once in DRAM);
ways take turns, so that a machine that slows down slows them alike.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.report import origin
from ratel.hardware.doctor import describe_cuda
from ratel.hardware.host import describe_host
from ratel.runtime.session.session import Session
from ratel.training.bench.step import random_tokens, use_quick_weights

WAYS: dict[str, dict[str, Any]] = {
    "nothing": dict(checksums="off"),
    "checksums": dict(),
    "checksums, a commit every step": dict(durable="step"),
    "checksums, a copy in the background": dict(durable="checkpoint"),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--tier", default="ssd", choices=["ssd", "dram"])
    parser.add_argument("--optimizer", default="deferred", choices=["deferred", "eager"])
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each way and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--copy-every", type=int, default=4, help="steps from one background copy to the next")
    parser.add_argument("--ssd", required=True)
    parser.add_argument("--out", required=True, help="where copies and commit records go")
    parser.add_argument("--dram", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json")
    return parser.parse_args()


def make_config(args: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4, num_hidden_layers=args.layers,
                       num_attention_heads=args.hidden // 128, num_key_value_heads=max(1, args.hidden // 512),
                       vocab_size=32000, tie_word_embeddings=False)


@contextmanager
def opened(args: argparse.Namespace, way: str) -> Iterator[Session]:
    options = {**WAYS[way], "ssd": args.ssd.split(","), "tier": args.tier, "device": args.device, "dram": args.dram}
    if options.get("durable") == "step":
        options["commits"] = Path(args.out) / "commits"
    clip = dict(max_grad_norm=1.0 if args.optimizer == "deferred" else 0.0, optimizer=args.optimizer)
    with Session(make_config(args), **options, **clip) as session:
        use_quick_weights(session)
        session.prepare(args.batch, args.seq_len)
        yield session


def run(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """Seconds of each measured step; the first step, which reads everything once more, is left
    out."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    seconds: list[float] = []
    with opened(args, way) as session:
        durable = WAYS[way].get("durable")
        for index in range(1 + args.steps):
            tokens = random_tokens(index, args.batch, args.seq_len, 32000)
            begun = time.perf_counter()
            session.step({"input_ids": tokens})
            if durable == "step":
                session.commit()
            elif durable == "checkpoint" and index % args.copy_every == 0:
                session.save(Path(args.out) / "copy", wait=False)
            seconds.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        session.wait_saved()
        waited_s = time.perf_counter() - begun
        plan = session.plan
        facts = {"parameters": plan.spec.num_params, "state_bytes": plan.state_bytes,
                 "saved_bytes": plan.save_bytes if durable else 0, "save_buffers_bytes": plan.dram_items.get("buffers for saving")}
    shutil.rmtree(args.out, ignore_errors=True)
    for file in (path for folder in args.ssd.split(",") for path in Path(folder).glob("ratel-*")):
        file.unlink()
    return {"seconds": seconds[1:], "waited_at_the_end_s": waited_s, **facts}


def main() -> None:
    args = parse()
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for round_number in range(args.rounds):
        for way in WAYS:
            runs[way].append(run(args, way))
            print(f"round {round_number + 1}, {way}: {[round(s, 3) for s in runs[way][-1]['seconds']]}", flush=True)
    base = statistics.mean(s for r in runs["nothing"] for s in r["seconds"])
    report = {**origin(), "host": describe_host(), "cuda": describe_cuda(),
              "torch": torch.__version__, "settings": {k: v for k, v in vars(args).items() if k not in ("ssd", "out", "json")},
              "ways": {}}
    for way, results in runs.items():
        mean = statistics.mean(s for r in results for s in r["seconds"])
        report["ways"][way] = {"step_s": mean, "ratio": mean / base, "runs": results}
        print(f"{way:40} {mean:8.3f} s a step  {mean / base:6.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
