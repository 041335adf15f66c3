"""Fine-tuning by Ratel beside transformers' Trainer: the same model, batches and AdamW, in fp32 on
the CPU.

    pip install --no-deps accelerate
    python -m benchmarks.exactness.against_trainer --model DIR --json benchmarks/results/NAME_trainer.json

Text, completions and conversations are made into batches by `ratel.data` once, and both are given
these. Compared are every step's loss and gradient norm, and what the two exported models generate,
greedily, from a few prompts. The status is 1 if losses or norms differ by more than 1e-6
(relative), or one generated token does. Trainer's norm is taken from its gradients in fp64: the one
that it logs is a sum in fp32, which is noted beside. Trainer also runs with the rows of each batch
in another order, which is the same in exact numbers: AdamW makes steps of one size from gradients
of rounding, and where its two runs differ by more than 5e-7, twice that is the limit for Ratel.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
KINDS = ("text", "completions", "conversations")
LIMIT = 1e-6
PROMPTS = ("The tide", "Question: what is 3 plus 4?\nAnswer:", "A short list of birds:")
NEW_TOKENS = 12
BETAS, EPS, CLIP = (0.9, 0.999), 1e-8, 1.0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """``losses`` and ``norms`` (before clipping) by step, and the directory of the trained model.
    ``logged``: norms as Trainer logs them."""

    losses: list[float]
    norms: list[float]
    model: Path
    logged: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``loss_error``, ``norm_error``, and how far Trainer's logged norm is from its own gradients':
    the largest of any step, relative."""

    kind: str
    steps: int
    targets: int
    first_loss: float
    last_loss: float
    loss_error: float
    norm_error: float
    logged_norm_error: float | None
    """None where Trainer logs none."""

    own_loss_error: float
    own_norm_error: float
    """By how much Trainer's norms differ with rows in another order."""
    generates_the_same: bool

    @property
    def is_equal(self) -> bool:
        return (self.loss_error <= max(LIMIT, 2 * self.own_loss_error) and self.norm_error <= max(LIMIT, 2 * self.own_norm_error)
                and self.generates_the_same)


def records(kind: str, count: int = 160) -> Iterator[dict[str, Any]]:
    """Short ones with a pattern to learn, all different."""
    names = ("tern", "gull", "heron", "wren", "crane")
    for i in range(count):
        a, b, bird = i % 17, i * 7 % 13, names[i % len(names)]
        if kind == "text":
            yield {"text": f"The {bird} number {i} came at {a} and left at {a + b}. The tide turned {b} times."}
        elif kind == "completions":
            yield {"prompt": f"Question: what is {a} plus {b}?\nAnswer:", "completion": f" {a + b}."}
        else:
            yield {"messages": [{"role": "user", "content": f"What is {a} plus {b}?"}, {"role": "assistant", "content": f"It is {a + b}."},
                                {"role": "user", "content": f"And where is {bird} {i}?"}, {"role": "assistant", "content": "By the sea."}]}


def make_batches(model: Path, kind: str, steps: int, rows: int, seq_len: int) -> list[Batch]:
    from ratel.data import load_tokenizer, open_dataset

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records(kind)), encoding="utf-8")
        with open_dataset(path, load_tokenizer(str(model)), seq_len=seq_len, batch_size=rows, eval_fraction=0.0, seed=0) as data:
            batches = iter(data.batches())
            made = [{key: value.clone() for key, value in next(batches).items()} for _ in range(steps)]
    for batch in made:
        batch["labels"][:, 0] = -100  # nothing predicts it, but Trainer counts it
    return made


def train_with_ratel(model: Path, batches: list[Batch], lr: float, clip: float, out: Path) -> Trained:
    import ratel

    result = ratel.train(str(model), batches, steps=len(batches), batch_size=batches[0]["input_ids"].shape[0],
                         seq_len=batches[0]["input_ids"].shape[1], lr=lr, schedule="constant", warmup_steps=0, betas=BETAS, eps=EPS,
                         weight_decay=0.0, max_grad_norm=clip, dtype="fp32", device="cpu", out=str(out), quiet=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    return Trained(losses=list(result.losses), norms=norms, model=out / "model")


def train_with_trainer(model: Path, batches: list[Batch], lr: float, clip: float, out: Path) -> Trained:
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    losses: list[float] = []
    norms: list[float] = []
    logged: list[float] = []

    class Recording(Trainer):
        def get_train_dataloader(self) -> Iterable[Batch]:
            return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            norms.append(sum(p.grad.double().square().sum().item() for p in self.model.parameters() if p.grad is not None) ** 0.5)
            return loss

    class Norms(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if "grad_norm" in logs:
                logged.append(float(logs["grad_norm"]))

    arguments = TrainingArguments(output_dir=str(out / "checkpoints"), max_steps=len(batches), learning_rate=lr, optim="adamw_torch",
                                  lr_scheduler_type="constant", warmup_steps=0, adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS,
                                  weight_decay=0.0, max_grad_norm=clip, use_cpu=True, logging_steps=1, save_strategy="no", report_to=[],
                                  disable_tqdm=True, gradient_accumulation_steps=1)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = Recording(model=module, args=arguments, train_dataset=batches, callbacks=[Norms()])
    trainer.train()
    trainer.save_model(str(out / "model"))
    return Trained(losses=losses, norms=norms, model=out / "model", logged=tuple(logged))


def generated(model: Path, tokenizer_of: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    from ratel.data import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_of))
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        answer = module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(answer[0].tolist())
    return found


def compare(model: Path, kind: str, *, steps: int, rows: int, seq_len: int, lr: float, clip: float = CLIP) -> Outcome:
    batches = make_batches(model, kind, steps, rows, seq_len)
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        ours = train_with_ratel(model, batches, lr, clip, base / "ratel")
        theirs = train_with_trainer(model, batches, lr, clip, base / "trainer")
        again = train_with_trainer(model, [{key: value.flip(0) for key, value in batch.items()} for batch in batches], lr, clip,
                                   base / "again")
        same = generated(ours.model, model) == generated(theirs.model, model)
    return Outcome(kind=kind, steps=steps, targets=sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches),
                   first_loss=ours.losses[0], last_loss=ours.losses[-1], loss_error=_error(ours.losses, theirs.losses),
                   norm_error=_error(ours.norms, theirs.norms), logged_norm_error=_error(list(theirs.logged), theirs.norms) if theirs.logged else None,
                   own_loss_error=_error(again.losses, theirs.losses), own_norm_error=_error(again.norms, theirs.norms),
                   generates_the_same=same)


def _error(ours: list[float], theirs: list[float]) -> float:
    """Infinite where they are not of as many steps."""
    if len(ours) != len(theirs) or not ours:
        return float("inf")
    return max(abs(one - other) / abs(other) for one, other in zip(ours, theirs))


def main() -> int:
    from benchmarks.harness.report import Report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory with a tokenizer and a chat template")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--max-grad-norm", type=float, default=CLIP, help="clip the global norm here, in both (default: 1; 0: do not clip)")
    parser.add_argument("--json", help="where the results go")
    args = parser.parse_args()
    import transformers

    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    report = Report(args.json, benchmark="against_trainer", model={key: config.get(key) for key in (
        "model_type", "num_hidden_layers", "hidden_size", "vocab_size")},
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        settings={key: getattr(args, key) for key in ("steps", "rows", "seq_len", "lr", "max_grad_norm")})
    is_equal = True
    for kind in args.kinds:
        outcome = compare(args.model, kind, steps=args.steps, rows=args.rows, seq_len=args.seq_len, lr=args.lr,
                          clip=args.max_grad_norm)
        is_equal &= outcome.is_equal
        report.add(asdict(outcome))
        print(f"{kind}: loss {outcome.first_loss:.4f} to {outcome.last_loss:.4f}; losses differ by {outcome.loss_error:.1e}, norms by "
              f"{outcome.norm_error:.1e} (Trainer from itself: {outcome.own_loss_error:.1e}, {outcome.own_norm_error:.1e}); generation {'is the same' if outcome.generates_the_same else 'DIFFERS'}", flush=True)
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
