"""The last lines of a run."""

import math
from collections.abc import Iterator

from ratel.training.loop import Progress
from ratel.training.output import RunDirectory
from ratel.units import format_count, format_seconds


def summarize(progress: Progress, seconds: float, out: RunDirectory, *, exported: str | None) -> Iterator[str]:
    before = f", {format_count(progress.steps_before, 'step')} of them before it was resumed;" if progress.steps_before else " in"
    yield (f"{format_count(progress.steps, 'step')}, {format_count(progress.tokens, 'token')}{before} {format_seconds(seconds)} "
           f"({progress.tokens / max(progress.train_s, 1e-9):,.0f} tok/s in training)")
    yield _losses(progress)
    if progress.bound_by and progress.steps:
        step_s, bound_s = progress.train_s / progress.steps, progress.bound_s / progress.steps
        often = max(progress.bound_by, key=lambda name: progress.bound_by[name])
        yield (f"{format_seconds(step_s)} a step; its busiest resource, mostly {often}, needs "
               f"{format_seconds(bound_s)} ({bound_s / step_s:.0%})")
    yield f"{out.path}: metrics.jsonl (one object per step){_exported(out, exported)}, config.json, plan.json, hardware.json, startup.json"
    state = out.states.newest()
    if state is not None:
        yield f"{state}: the training state; `ratel train --out {out.path} --resume` continues from it, up to --steps N"


def _exported(out: RunDirectory, name: str | None) -> str:
    if name is None:
        return ""
    if name == "adapter":
        return ", adapter/ (loads with peft)"
    how = "loads with transformers" if (out.model / "config.json").exists() else "model.safetensors, the module's state dict"
    return f", model/ ({how})"


FEW_STEPS = 10


def _course(losses: list[float]) -> str:
    """The course from the first loss to the last; one batch says little, so in a longer run to the
    mean of the last ones."""
    if len(losses) < 2 * FEW_STEPS:
        return f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    return f"loss {losses[0]:.4f} -> {sum(losses[-FEW_STEPS:]) / FEW_STEPS:.4f} (mean of the last {FEW_STEPS})"


def _losses(progress: Progress) -> str:
    finite = [loss for loss in progress.losses if math.isfinite(loss)]
    parts = [_course(finite) if finite else "no loss was finite"]
    if progress.eval_losses:
        step, loss = max(progress.eval_losses.items())
        parts.append(f"evaluation {loss:.4f} after step {step}")
    if len(finite) < progress.steps:
        parts.append(f"{format_count(progress.steps - len(finite), 'step')} skipped")
    return ", ".join(parts)
