"""Step time of a Llama-shaped model under budgets, on whatever device is here; one JSON object per configuration.

    python benchmarks/step.py --batch 8 32 --gpu-memory 24GiB --tier auto --json results.json
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback

import torch

from ratel.runtime.session import Session
from ratel.units import format_bytes


def shaped_config(args: argparse.Namespace):
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.heads,
                       num_key_value_heads=args.kv, intermediate_size=args.ffn, vocab_size=args.vocab,
                       max_position_embeddings=args.seq, tie_word_embeddings=False)


def fill_quickly(session: Session) -> None:
    """Random weights repeated from one block of a million: initialising billions one by one takes minutes."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02

    def read_unit(unit, out: torch.Tensor) -> None:
        repeats = -(-out.numel() // block.numel())
        out.copy_(block.repeat(repeats)[: out.numel()])
        spec = session.parts.spec.units[unit]
        for param in spec.params:
            if len(param.shape) < 2:
                out[param.offset : param.end] = 1.0  # norms
        covered = torch.zeros(out.numel(), dtype=torch.bool)
        for param in spec.params:
            covered[param.offset : param.end] = True
        out[~covered] = 0.0

    session.parts.read_unit = read_unit


def measure(args: argparse.Namespace, batch: int, tier: str, clip: float) -> dict:
    with tempfile.TemporaryDirectory(dir=args.ssd) as ssd:
        begun = time.perf_counter()
        session = Session(shaped_config(args), gpu_memory=args.gpu_memory, dram=args.dram, ssd=[ssd] if args.ssd else None,
                          device=args.device, tier=tier, max_grad_norm=clip, lr=1e-5, ssd_bandwidth=args.ssd_bandwidth,
                          micro_batch=args.micro_batch if args.micro_batch == "auto" else int(args.micro_batch),
                          checkpoint_tier=args.checkpoint_tier, optimizer=args.optimizer,
                          optimizer_threads=args.threads if args.threads == "auto" else int(args.threads))
        with session:
            fill_quickly(session)
            session.prepare(batch, args.seq)
            start_s = time.perf_counter() - begun
            steps = [run_step(session, args, batch, index) for index in range(args.warm + args.steps)]
            return summarize(session, args, batch, tier, clip, start_s, steps)


def run_step(session: Session, args: argparse.Namespace, batch: int, index: int) -> dict:
    ids = torch.randint(0, args.vocab, (batch, args.seq), generator=torch.Generator().manual_seed(index))
    out = session.step({"input_ids": ids})
    print(f"  step {index}: {out.seconds:.3f} s, loss {out.loss:.4f}, norm {out.grad_norm:.3f}, "
          + ", ".join(f"{k} {v:.3f}" for k, v in out.usage.busy_s.items()), flush=True)
    return {"seconds": out.seconds, "loss": out.loss, "busy_s": out.usage.busy_s,
            "ssd_read": out.usage.ssd_read_bytes, "ssd_written": out.usage.ssd_written_bytes}


def summarize(session: Session, args: argparse.Namespace, batch: int, tier: str, clip: float, start_s: float,
              steps: list[dict]) -> dict:
    import psutil

    counted = steps[args.warm :]
    step_s = statistics.median(s["seconds"] for s in counted)
    params, tokens = session.plan.spec.num_params, batch * args.seq
    busy = {key: statistics.median(s["busy_s"][key] for s in counted) for key in counted[0]["busy_s"]}
    return {"params": params, "batch": batch, "seq": args.seq, "tier": tier, "clip": clip, "step_s": step_s,
            "tokens_per_s": tokens / step_s, "tflops_6pn": 6 * params * tokens / step_s / 1e12, "busy_s": busy,
            "bound_s": max(busy.values()), "start_s": start_s, "losses": [s["loss"] for s in steps],
            "ssd_read_bytes": counted[-1]["ssd_read"], "ssd_written_bytes": counted[-1]["ssd_written"],
            "gpu_peak_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None,
            "rss_bytes": psutil.Process().memory_info().rss, "plan": session.plan.describe(),
            "micro_rows": session.plan.work.micro_rows, "gpu_units": sum(p.on_gpu for p in session.plan.placements),
            "gpu_items": session.plan.gpu_items, "dram_items": session.plan.dram_items,
            "all_steps_s": [s["seconds"] for s in steps], "hardware": {**session.hardware, **describe()}}


def describe() -> dict:
    cuda = torch.cuda.is_available()
    return {"torch": torch.__version__, "gpu": torch.cuda.get_device_name() if cuda else None, "python": sys.version[:6]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 28), ("hidden", 3072), ("heads", 24), ("kv", 8), ("ffn", 8192), ("vocab", 32000),
                          ("seq", 1024), ("steps", 4), ("warm", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--clip", type=float, nargs="+", default=[1e9])
    parser.add_argument("--tier", nargs="+", default=["auto"])
    for name, default in (("gpu-memory", None), ("dram", None), ("ssd", None), ("device", "auto"), ("micro-batch", "auto"),
                          ("checkpoint-tier", "auto"), ("optimizer", "auto"), ("threads", "auto"), ("json", None),
                          ("ssd-bandwidth", None)):
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_args()


def main() -> None:
    args, results = parse(), []
    for tier in args.tier:
        for batch in args.batch:
            for clip in args.clip:
                print(f"batch {batch}, tier {tier}, clip {clip:g}", flush=True)
                try:
                    results.append(measure(args, batch, tier, clip))
                    last = results[-1]
                    print(f"  {last['plan']}\n  => {last['step_s']:.3f} s/step, bound {last['bound_s']:.3f} s, start "
                          f"{last['start_s']:.1f} s, RSS {format_bytes(last['rss_bytes'])}", flush=True)
                except Exception as error:  # noqa: BLE001 - the other configurations still count
                    traceback.print_exc()
                    results.append({"batch": batch, "tier": tier, "clip": clip, "error": str(error)})
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
