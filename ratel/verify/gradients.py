"""Gradients of a session beside those of autograd.

Two that are equal in every bit need no more. Where they are not, the error against the same model
in a higher precision counts: it may be twice that of plain PyTorch, and a rounding of the type
itself. Plain PyTorch's error is that in the parameter, or in the gradient as a whole where that is
more: in a scalar it may be small by chance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ratel.runtime.session.session import Session
from ratel.verify.findings import FAILED, HOLDS, Finding

Grads = dict[str, Tensor]
ROUNDING = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7}
SHARE = 1e-3
"""Below this share of the whole gradient's norm a parameter's own is noise (the bias of keys, which
attention does not feel)."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A forward and backward pass: its loss, and the gradients that are not None, in fp32 or
    fp64."""

    loss: float
    grads: Grads


def session_options(dtype: torch.dtype, rows: int) -> dict[str, object]:
    """Options of a session whose first moment forgets at once, and so is the gradient."""
    return dict(dtype="bf16" if dtype is torch.bfloat16 else "fp32", device="cpu", lr=1e-3, betas=(0.0, 0.999), max_grad_norm=0,
                micro_batch=rows, optimizer_threads=1)


def pass_of(session: Session, batch: dict[str, Tensor]) -> Pass:
    """One step, with a session of `session_options`."""
    loss = session.step(batch).loss
    grads: Grads = {}
    for unit in session.plan.spec.units:
        if not unit.num_trainable:
            continue
        moment = session.read_state(unit, "m")
        grads.update({p.name: moment[p.offset : p.end].view(p.shape).clone() for p in unit.params if p.trainable})
    return Pass(loss=loss, grads=grads)


def compare(about: str, ours: Pass, plain: Pass, exact: Callable[[], Pass], rounding: float) -> Finding:
    """``plain``: what autograd makes in the same precision; ``exact``: in a higher one, where that
    is needed."""
    problem = _unlike_names(ours, plain)
    if problem:
        return Finding(about=about, outcome=FAILED, detail=problem)
    if all(torch.equal(ours.grads[name], grad) for name, grad in plain.grads.items()):
        return Finding(about=about, outcome=HOLDS, detail="bitwise")
    return _compare_errors(about, ours, plain, exact(), rounding)


def _compare_errors(about: str, ours: Pass, plain: Pass, exact: Pass, rounding: float) -> Finding:
    if not abs(ours.loss - exact.loss) <= 2 * abs(plain.loss - exact.loss) + rounding * max(1.0, abs(exact.loss)):
        return Finding(about=about, outcome=FAILED, detail=f"loss {ours.loss:.7g}, plain PyTorch {plain.loss:.7g}")
    total = _norm(list(exact.grads.values()))
    usual = _norm([plain.grads[name].to(grad) - grad for name, grad in exact.grads.items()]) / max(total, 1e-30)
    worst, where = 0.0, ""
    for name, grad in exact.grads.items():
        error, plain_error = (_norm([side.grads[name].to(grad) - grad]) for side in (ours, plain))
        scale = grad.norm().item() + SHARE * total
        excess = error / (2 * max(plain_error, usual * scale) + rounding * scale)
        if not excess <= worst:  # NaN counts as the worst
            worst, where = excess, f"{name}: off by {error / scale:.1e}, plain PyTorch by {plain_error / scale:.1e}"
        if math.isnan(worst):
            break
    if not worst <= 1:
        return Finding(about=about, outcome=FAILED, detail=where)
    return Finding(about=about, outcome=HOLDS, detail="to rounding")


def _unlike_names(ours: Pass, plain: Pass) -> str | None:
    missing = [name for name, grad in plain.grads.items() if name not in ours.grads and grad.any()]
    if missing:
        return f"{missing[0]} has a gradient and is not trained"
    extra = [name for name, grad in ours.grads.items() if name not in plain.grads and grad.any()]
    return f"{extra[0]} has no gradient in autograd, and one here" if extra else None


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().norm() for t in tensors]).norm()) if tensors else 0.0
