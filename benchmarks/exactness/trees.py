"""Whether two versions of the source give the same bits: short sessions on the CPU under many
options, in one tree and in the other.

    git worktree add ../before COMMIT        # and its native code: python -m op_ds.build; python -m nvme_ds.build
    python -m benchmarks.exactness.trees ../before . [--only llama] [--json FILE]

Each tree is given the same sessions in a process of its own, which knows nothing but what a user of
`ratel.Session` knows, so that a tree of long ago can be asked as well. A session's digest is of all
losses and norms, of the evaluation at the end, and of every plane of every unit. What a tree does
not have (an option that came later) is told, and no difference.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
VOCABULARY, POSITIONS, ROWS, STEPS = 96, 16, 4, 3
COMMON = {"device": "cpu", "lr": 1e-2, "micro_batch": 2, "weight_decay": 0.1, "hardware": "none"}
CLIPPING = {"never": 1e9, "always": 1e-3}
TIERS, DTYPES = ("gpu", "dram", "ssd"), ("fp32", "bf16")
MIXED = {"*": {"hi": "dram", "lo": "ssd", "m": "ssd", "v": "dram", "g": "dram"}, "block.1": "ssd", "block.2": "gpu",
         "block.3": {"hi": "ssd", "g": "ssd"}}
PLANES = ("hi", "lo", "m", "v")
FAMILIES = ("llama", "tied", "gpt2 with dropout", "mixtral", "own loss")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One session, or one and another that goes on with its state."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    resumes: str = ""
    """From what the second one loads: a copy, or commits in place."""
    frozen: str = ""
    """A part of the names of parameters that are not trained."""

    @property
    def name(self) -> str:
        given = [f"{key}={'mixed' if value is MIXED else value}" for key, value in self.options.items()]
        return ", ".join([self.family, *given, *([f"resumes a {self.resumes}"] if self.resumes else []),
                          *([f"frozen {self.frozen}"] if self.frozen else [])])


def cases() -> Iterator[Case]:
    for family, dtype, tier in product(FAMILIES, DTYPES, TIERS):
        yield Case(family=family, options={"dtype": dtype, "tier": tier})
    for dtype in DTYPES:
        yield from _of_updates(dtype)
        yield from _of_activations(dtype)
        yield from _of_states(dtype)
        yield from _of_transfers(dtype)


def _of_updates(dtype: str) -> Iterator[Case]:
    for place in ({"tier": "dram"}, {"tier": "ssd"}, {"placement": MIXED}):
        yield Case(family="llama", options={"dtype": dtype, **place, "optimizer": "eager", "max_grad_norm": 0})
        for optimizer, clip in product(("deferred", "speculative"), CLIPPING.values()):
            yield Case(family="llama", options={"dtype": dtype, **place, "optimizer": optimizer, "max_grad_norm": clip})
    for rows in (1, 3, 4):
        yield Case(family="gpt2 with dropout", options={"dtype": dtype, "placement": MIXED, "micro_batch": rows})
    yield Case(family="llama", options={"dtype": dtype, "tier": "ssd", "betas": (0.8, 0.95), "eps": 1e-6, "seed": 7})
    yield Case(family="llama", options={"dtype": dtype, "tier": "ssd", "hardware": "h200-box"})


def _of_activations(dtype: str) -> Iterator[Case]:
    for kept in ("recompute", "spill", "gpu", "dram", "ssd"):
        yield Case(family="llama", options={"dtype": dtype, "tier": "ssd", "activations": kept})
    for tier in TIERS:
        yield Case(family="mixtral", options={"dtype": dtype, "tier": "dram", "checkpoint_tier": tier})


def _of_states(dtype: str) -> Iterator[Case]:
    for tier, optimizer in product(("gpu", "ssd"), ("deferred", "speculative")):
        yield Case(family="gpt2 with dropout", options={"dtype": dtype, "tier": tier, "optimizer": optimizer}, resumes="copy")
    for optimizer, clip in (("eager", 0), ("deferred", 1.0), ("speculative", 1e-3)):
        yield Case(family="llama", options={"dtype": dtype, "tier": "ssd", "durable": "step", "optimizer": optimizer, "max_grad_norm": clip},
                   resumes="commit")
    for frozen, tier in product(("mlp", "layers.1."), ("dram", "ssd")):
        yield Case(family="llama", options={"dtype": dtype, "tier": tier}, frozen=frozen)


def _of_transfers(dtype: str) -> Iterator[Case]:
    for options in ({"checksums": "off"}, {"io_backend": "threads"}, {"direct": "off"}, {"optimizer_threads": 2}):
        yield Case(family="tied", options={"dtype": dtype, "tier": "ssd", **options})


# --- in a tree --------------------------------------------------------------------------------------------------------


def tell(only: str) -> None:
    """One line of JSON for each session, in the tree that this process runs in."""
    import ratel

    assert Path(ratel.__file__).resolve().is_relative_to(Path.cwd()), "another tree than this process was started in"
    for case in cases():
        if only in case.name:
            print(json.dumps({"name": case.name, **_told(case)}), flush=True)


def _told(case: Case) -> dict[str, str]:
    from ratel.errors import RatelError

    with tempfile.TemporaryDirectory(prefix="ratel-trees-") as place:
        try:
            return {"digest": digest_of(case, Path(place))}
        except (RatelError, TypeError) as error:
            return {"refused": f"{type(error).__name__}: {error}"}


def digest_of(case: Case, place: Path) -> str:
    ssd, state, found = place / "ssd", place / "state", hashlib.sha256()
    ssd.mkdir()
    commits = {"commits": state} if case.options.get("durable") == "step" else {}
    options = {**COMMON, "ssd": [ssd], **commits, **case.options}
    steps = batches(case.family, 2 * STEPS if case.resumes else STEPS)
    with opened(case, options) as session:
        _train(session, steps[:STEPS], found, session.commit if commits else None)
        if case.resumes == "copy":
            session.save(state)
        _add_states(session, found)
    if case.resumes:
        with opened(case, options) as session:
            session.load(state)
            _train(session, steps[STEPS:], found)
            _add_states(session, found)
    return found.hexdigest()


def opened(case: Case, options: dict[str, Any]) -> Any:
    from ratel import Session

    model = build(case.family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (case.frozen and case.frozen in name))
    return Session(model, loss_fn=mean_square if case.family == "own loss" else None, **options)


def _train(session: Any, steps: list[dict[str, Any]], found: Any, commit: Callable[..., None] | None = None) -> None:
    for batch in steps:
        result = session.step(batch)
        found.update(f"{result.loss!r} {result.grad_norm!r}\n".encode())
        if commit is not None:
            commit(wait=True)
    found.update(f"{session.evaluate(steps[:1])!r}\n".encode())


def _add_states(session: Any, found: Any) -> None:
    """Bits by unit and plane. A plane that a unit has not (the moments of a frozen one) is empty in
    any tree."""
    import torch

    for unit, plane in product(session.plan.spec.units, PLANES):
        try:
            state = session.read_state(unit, plane)
        except (KeyError, AttributeError):
            continue
        if state.numel():
            found.update(f"{unit.name} {plane}\n".encode() + state.contiguous().view(torch.uint8).numpy().tobytes())


def build(family: str) -> Any:
    """A model of four blocks with fresh weights, always the same."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    size = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
                num_key_value_heads=2, max_position_embeddings=64)
    if family == "own loss":
        return torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True) for _ in range(4)))
    if family == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**size, num_local_experts=4, num_experts_per_tok=2))
    if family == "gpt2 with dropout":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=4, n_head=2))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**size, tie_word_embeddings=family == "tied"))


def mean_square(model: Any, batch: dict[str, Any]) -> Any:
    return (model(batch["x"]).float() - batch["y"]).square().mean()


def batches(family: str, count: int) -> list[dict[str, Any]]:
    import torch

    generator = torch.Generator().manual_seed(5)
    if family == "own loss":
        return [{key: torch.randn(ROWS, POSITIONS, 32, generator=generator) for key in "xy"} for _ in range(count)]
    ids = [torch.randint(0, VOCABULARY, (ROWS, POSITIONS), generator=generator) for _ in range(count)]
    hidden = [torch.rand(each.shape, generator=generator) < 0.2 for each in ids]
    return [{"input_ids": each, "labels": each.masked_fill(out, -100)} for each, out in zip(ids, hidden)]


# --- of two trees -----------------------------------------------------------------------------------------------------


def told_by(tree: Path, only: str) -> dict[str, dict[str, str]]:
    """What its sessions tell, by name."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(HERE), "--tell", "--only", only], cwd=tree, env=environment, text=True,
                          stdout=subprocess.PIPE, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("name"): line for line in lines}


def compared(one: dict[str, dict[str, str]], other: dict[str, dict[str, str]]) -> dict[str, Any]:
    both = [name for name in one if "digest" in one[name] and "digest" in other[name]]
    return {"sessions": len(both), "equal": sum(one[name] == other[name] for name in both),
            "different": [name for name in both if one[name] != other[name]],
            "refused": {name: [one[name].get("refused"), other[name].get("refused")] for name in one if name not in both}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, help="two directories with the source and its native code")
    parser.add_argument("--only", default="", metavar="TEXT", help="sessions that have this in their names")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tell", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tell:
        sys.path.remove(str(HERE.parent))  # its modules are not the tree's
        tell(args.only)
        return 0
    if len(args.trees) != 2:
        parser.error("two trees are compared")
    found = compared(*(told_by(tree.resolve(), args.only) for tree in args.trees))
    text = json.dumps(found, indent=1)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)
    return int(found["equal"] < found["sessions"] or not found["sessions"])


if __name__ == "__main__":
    sys.exit(main())
