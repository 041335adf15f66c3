"""An adapter trained by Ratel beside peft with PyTorch's AdamW: the same pretrained model, batches
and first values, in fp32 on the CPU.

    python -m benchmarks.exactness.against_peft --model DIR --json benchmarks/results/NAME_peft.json

For each seed both begin with the adapter that Ratel draws from it, and take the same batches, of
which the last are held out. Compared are the losses of every step and the evaluation loss at the
end; the spread of evaluation losses between seeds is beside them. peft runs once more with the rows
of each batch in another order, which is the same in exact numbers. The status is 1 if a loss differs
by more than 1e-6, or twice what peft differs by from itself, relative.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.exactness.against_trainer import Batch, make_batches
from benchmarks.harness.report import Report

BETAS, EPS, LIMIT = (0.9, 0.999), 1e-8, 1e-6
HELD_OUT = 4


def train_with_ratel(model: Path, batches: Sequence[Batch], held_out: Sequence[Batch], args: argparse.Namespace, seed: int,
                     first: Path) -> tuple[list[float], float]:
    """``first``: where the adapter goes that both begin with."""
    from ratel import Session

    rows, seq_len = batches[0]["input_ids"].shape
    with Session(str(model), lora=args.rank, lora_alpha=2 * args.rank, lr=args.lr, betas=BETAS, eps=EPS, max_grad_norm=0, dtype="fp32",
                 device="cpu", seed=seed) as session:
        session.prepare(rows, seq_len)
        session.export(first)
        losses = [session.step(batch).loss for batch in batches]
        return losses, session.evaluate(held_out)


def train_with_peft(model: Path, batches: Sequence[Batch], held_out: Sequence[Batch], args: argparse.Namespace,
                    first: Path) -> tuple[list[float], float]:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    module = peft.PeftModel.from_pretrained(base, str(first), is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=args.lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss, count = _loss(module, batch)
        (loss / count).backward()
        optimizer.step()
        losses.append(loss.item() / count)
    with torch.no_grad():
        sums = [_loss(module.eval(), batch) for batch in held_out]
    return losses, sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)


def _loss(module: Any, batch: Batch) -> tuple[Tensor, int]:
    """The sum over targets, and their number. With a cache transformers would not keep documents
    apart that share a row."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    logits, targets = module(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((targets != -100).sum())


def other_order(batches: Sequence[Batch]) -> list[Batch]:
    return [{name: values.flip(0) for name, values in batch.items()} for batch in batches]


def difference(some: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(some, others, strict=True))


def compare(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    made = make_batches(args.model, args.kind, args.steps + HELD_OUT, args.rows, args.seq_len)
    batches, held_out = made[:args.steps], made[args.steps:]
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "adapter"
        ours, our_end = train_with_ratel(args.model, batches, held_out, args, seed, first)
        theirs, their_end = train_with_peft(args.model, batches, held_out, args, first)
        again, _ = train_with_peft(args.model, other_order(batches), held_out, args, first)
    return {"seed": seed, "losses": ours, "peft_losses": theirs, "eval_loss": our_end, "peft_eval_loss": their_end,
            "loss_error": difference(ours, theirs), "peft_own_error": difference(again, theirs),
            "eval_error": difference([our_end], [their_end])}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory, with its tokenizer")
    parser.add_argument("--kind", choices=("text", "completions", "conversations"), default="completions")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json")
    return parser.parse_args()


def main() -> int:
    args = parse()
    report = Report(args.json, torch=torch.__version__, model=args.model.name, rank=args.rank, steps=args.steps, rows=args.rows,
                    seq_len=args.seq_len, lr=args.lr, kind=args.kind)
    for seed in args.seeds:
        report.add(point := compare(args, seed))
        print(f"seed {seed}: loss {point['losses'][0]:.4f} -> {point['losses'][-1]:.4f}, differs from peft's by {point['loss_error']:.1e} "
              f"(peft from itself {point['peft_own_error']:.1e}); evaluation {point['eval_loss']:.6f}, peft {point['peft_eval_loss']:.6f}",
              flush=True)
    report.write()
    return int(any(point["loss_error"] > max(LIMIT, 2 * point["peft_own_error"]) for point in report.points))


if __name__ == "__main__":
    sys.exit(main())
