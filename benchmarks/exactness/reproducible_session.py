"""Steps of a session that must have the same bits, and hand-overs within steps that must leave them
alone."""

import gc
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.exactness.bitwise import Repetitions, difference
from ratel.runtime.session.result import StepResult
from ratel.runtime.session.session import Session
from ratel.training.bench.step import use_quick_weights
from benchmarks.exactness.session_watch import Digest, Noted, Watch, gradient_name, planes_in_memory, trained
from benchmarks.harness.systems import NEVER

PLANS: dict[str, dict[str, Any]] = {
    "all in GPU memory": dict(tier="gpu", activations="recompute", checkpoint_tier="gpu"),
    "states in DRAM": dict(tier="dram", activations="recompute", checkpoint_tier="gpu"),
    "states in DRAM, insides kept": dict(tier="dram", activations="gpu", checkpoint_tier="gpu"),
    "states in DRAM, insides kept there": dict(tier="dram", activations="dram", checkpoint_tier="dram"),
    "states in DRAM, block inputs there": dict(tier="dram", activations="recompute", checkpoint_tier="dram"),
}
"""Made without a machine's rates: they do what they are called. In the last one nothing of a block
stays on the GPU."""

DETERMINISTIC = "states in DRAM"
HANDED_OVER = {"states in DRAM, insides kept there": PLANS["states in DRAM, insides kept there"],
               "states in DRAM, updated early": {**PLANS["states in DRAM"], "optimizer": "speculative"}}

LOOKED_AT = 8
"""Gradients that are compared by elements where more differ: all after the first one do, and a CPU
takes seconds."""

UNKNOWN = {"elements": None, "of": None, "largest": None}
"""What is said of a tensor that is known by its digest alone."""


@contextmanager
def prepared(config: Any, rows: int, positions: int, options: dict[str, Any]) -> Iterator[Session]:
    """A session whose gradients stay after a step, and are never scaled."""
    fixed = {"dtype": "bf16", "hardware": "none", "max_grad_norm": NEVER, "optimizer": "deferred"}
    with Session(config, **{**fixed, **options}) as session:
        use_quick_weights(session)
        session.prepare(rows, positions)
        yield session
    give_memory_back()


def give_memory_back() -> None:
    """Give memory back to whatever comes next, perhaps in another process: sessions plan with what
    is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def repeat_steps(session: Session, batch: dict[str, Tensor], repeats: int) -> dict[str, Any]:
    """The same step again and again, with a learning rate of 0: weights, loss and gradients must
    have the same bits.

    ``begins``: the first repetition that differs, whether its loss does, and what does first in the
    order of the step.
    """
    found, begins = Repetitions(), None
    with Watch(session) as watch:
        outs, first = [session.step(batch, lr=0.0)], watch.take()
        gradients = {name: tensor.clone() for name, tensor in _gradients(session).items()}
        for repetition in range(1, repeats + 1):
            outs.append(session.step(batch, lr=0.0))
            noted = watch.take()
            scalars = [what for what in ("loss", "grad_norm") if getattr(outs[-1], what) != getattr(outs[0], what)]
            names = [what for what in first if noted[what] != first[what]]
            if names or scalars:
                begins = begins or {"repetition": repetition, "loss_differs": "loss" in scalars,
                                    "tensor": next(iter(names), None)}
            found.note(dict.fromkeys(scalars, UNKNOWN) | (_differences(session, gradients, names) if names else {}))
    return {**found.point, "begins": begins, **_facts(outs)}


def _gradients(session: Session) -> dict[str, Tensor]:
    """The gradients of the last step, where they wait to be used and are until the next."""
    session.flush()
    return {gradient_name(unit, param): plane[param.offset : param.end]
            for unit, name, plane in planes_in_memory(session) if name == "g" for param in trained(unit)}


def _differences(session: Session, first: dict[str, Tensor], names: list[str]) -> dict[str, dict[str, Any]]:
    later, looked_at = _gradients(session), [name for name in names if name in first][:LOOKED_AT]
    return {name: name in looked_at and difference(first[name], later[name]) or UNKNOWN for name in names}


def check_hand_overs(session: Session, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Steps that train: all digests of one thing within a step must be the same.

    ``begins``: the first step in which some are not, the first such thing, and its places, those
    with one digest each. ``moved``: the weights of every unit were others in every step; only then
    would those of the step before be noticed.
    """
    found, outs, begins, steps = Repetitions(), [], None, []
    with Watch(session, planes=True) as watch:
        for number, batch in enumerate(batches):
            outs.append(session.step(batch))
            steps.append(watch.take())
            wrong = [what for what, noted in steps[-1].items() if len({value for _, value in noted}) > 1]
            if wrong:
                begins = begins or {"repetition": number, "tensor": wrong[0], "places": _grouped(steps[-1][wrong[0]])}
            found.note(dict.fromkeys(wrong, UNKNOWN))
    compared = sum(len(noted) - 1 for step in steps for noted in step.values())
    return {**found.point, "begins": begins, "compared": compared, "moved": _moved(steps), **_facts(outs)}


def _grouped(noted: list[Digest]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for place, value in noted:
        groups.setdefault(value, []).append(place)
    return list(groups.values())


def _moved(steps: list[Noted]) -> bool:
    weights = [what for what in steps[0] if what.startswith("weights")]
    return all(one[what][0] != later[what][0] for one, later in zip(steps, steps[1:]) for what in weights)


def _facts(outs: list[StepResult]) -> dict[str, Any]:
    return {"loss": outs[0].loss, "grad_norm": outs[0].grad_norm,
            "step_s": statistics.median(out.seconds for out in outs)}
