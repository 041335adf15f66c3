"""What storing states in fewer bytes does to training: the same runs from several seeds in each
format, and how far their evaluation losses lie from those of exact states and from each other.

    python -m benchmarks.exactness.states --device cpu --dtype fp32 --json benchmarks/results/epyc2_states.json
    python -m benchmarks.exactness.states --model demo --rows 32 --seq-len 256 --json benchmarks/results/h200_states.json

A small model learns the bytes of the examples' text and of the documents from scratch. The last
tenth of each file is held out. A seed decides about the weights, the order of the text and what is
drawn when moments are rounded; two formats with one seed differ in nothing else.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.report import ROOT, Report
from benchmarks.harness.systems import model_config, read_model
from ratel.planner.formats import EXACT_NAME, FORMATS
from ratel.runtime.session.session import Session
from ratel.training.schedule import make_schedule

SMALL = {"model_type": "llama", "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 344, "max_position_embeddings": 1024, "tie_word_embeddings": True}
HELD_OUT = 0.1
EVALUATED_ROWS = 64


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=json.dumps(SMALL), help="a preset, or a configuration as JSON")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--states", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(arguments)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "seeds", "states", "model")}
    report = Report(args.json, kind="states", gpu=gpu, torch=torch.__version__, model=read_model(args.model), settings=settings)
    done = {(point["states"], point["seed"]) for point in report.points}
    text = Text(files(), args.seq_len)
    for seed in args.seeds:
        for states in args.states:
            if (states, seed) not in done:
                report.add({"states": states, "seed": seed, **train(args, text, states, seed)})
                print(f"{states} seed {seed}: {report.points[-1]['eval_losses'][-1][1]:.4f}", flush=True)
    report.write(summary=summary(report.points), text_bytes=text.num_bytes)
    print(json.dumps(report.content["summary"], indent=1))


def files() -> list[Path]:
    return sorted([*(ROOT / "examples" / "corpus").glob("*.txt"), *(ROOT / "docs").rglob("*.md")])


class Text:
    """Bytes to learn from, and bytes that are held out, in rows."""

    def __init__(self, files: list[Path], seq_len: int) -> None:
        contents = [torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files]
        borders = [int(len(content) * (1 - HELD_OUT)) for content in contents]
        self.num_bytes, self._seq_len = sum(map(len, contents)), seq_len
        self._learned = torch.cat([content[:border] for content, border in zip(contents, borders)])
        self._held_out = torch.cat([content[border:] for content, border in zip(contents, borders)])

    def batches(self, rows: int, count: int, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            begins = torch.randint(0, len(self._learned) - self._seq_len, (rows,), generator=generator)
            yield self._batch([self._learned[at : at + self._seq_len] for at in begins.tolist()])

    def evaluation(self) -> dict[str, Tensor]:
        step = max(1, (len(self._held_out) - self._seq_len) // EVALUATED_ROWS)
        begins = range(0, len(self._held_out) - self._seq_len, step)
        return self._batch([self._held_out[at : at + self._seq_len] for at in begins][:EVALUATED_ROWS])

    def _batch(self, rows: list[Tensor]) -> dict[str, Tensor]:
        ids = torch.stack(rows).long()
        return {"input_ids": ids, "labels": ids.clone()}


def train(args: argparse.Namespace, text: Text, states: str, seed: int) -> dict[str, Any]:
    """The losses of one run, and the evaluation losses along the way: ``(step, loss)``."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config(read_model(args.model)))
    schedule = make_schedule("cosine", lr=args.lr, steps=args.steps, warmup_steps=args.steps // 20)
    losses, evaluated = [], []
    with Session(model, states=states, seed=seed, device=args.device, dtype=args.dtype, lr=args.lr, weight_decay=0.1,
                 hardware="none") as session:
        for step, batch in enumerate(text.batches(args.rows, args.steps, seed), start=1):
            losses.append(session.step(batch, lr=schedule(step - 1)).loss)
            if step % args.eval_every == 0 or step == args.steps:
                evaluated.append((step, session.evaluate([text.evaluation()])))
    return {"losses": losses, "eval_losses": evaluated}


def summary(points: list[dict[str, Any]]) -> dict[str, Any]:
    """By format: the evaluation losses at the end, what they are above exact states' with the same
    seed, and beside that how far exact runs lie from each other."""
    last = {(p["states"], p["seed"]): p["eval_losses"][-1][1] for p in points}
    seeds = sorted({seed for _, seed in last})
    exact = [last[EXACT_NAME, seed] for seed in seeds if (EXACT_NAME, seed) in last]
    found: dict[str, Any] = {"seeds": seeds, "spread_of_exact": max(exact) - min(exact) if exact else None}
    for states in dict.fromkeys(states for states, _ in last):
        own = [last[states, seed] for seed in seeds if (states, seed) in last]
        above = [last[states, seed] - last[EXACT_NAME, seed] for seed in seeds
                 if {(states, seed), (EXACT_NAME, seed)} <= last.keys()]
        found[states] = {"eval_losses": own, "mean": sum(own) / len(own), "above_exact": above,
                         "mean_above_exact": sum(above) / len(above) if above else None}
    return found


if __name__ == "__main__":
    main()
