"""What a session does with batches: steps and evaluations."""

from collections.abc import Iterable
from time import perf_counter
from typing import Any

from ratel import interrupt
from ratel.errors import RatelError
from ratel.runtime.blocks.batch import nothing_to_learn
from ratel.runtime.session.core import Core
from ratel.runtime.session.preparing import check_gradients_can_be, ready_for
from ratel.runtime.session.recording import Recording
from ratel.runtime.session.result import StepResult


def step(core: Core, given: Any, lr: float, *, trace: bool) -> StepResult:
    begun = perf_counter()
    check_gradients_can_be()
    batch = ready_for(core, given)
    core.capacity.check(batch)
    if batch.targets == 0:
        raise nothing_to_learn()
    micro_batches = batch.split(core.plan.work.micro_rows, core.device)
    recording = Recording(core.machinery) if trace else None  # last: what is refused must not leave it on
    core.meter.begin()
    with core.protected():
        done = core.training.step(micro_batches, targets=batch.targets, attempt=core.attempts, hyper=core.hyper(lr))
        core.attempts += 1  # here, since an interrupt between a step and its counting must end the session, too
        core.updates_made += done.applied
    usage = core.meter.read()
    seconds = perf_counter() - begun
    return StepResult(step=core.attempts, loss=done.loss, grad_norm=done.grad_norm, lr=lr, tokens=batch.tokens,
                      seconds=seconds, bound_s=usage.bound_s, bound_by=usage.bound_by, skipped=not done.applied,
                      early_units=done.early_units, redone_units=done.redone_units, usage=usage,
                      timeline=recording.finish(core.attempts, begun) if recording else None)


def evaluate(core: Core, batches: Iterable[Any]) -> float:
    if not isinstance(batches, Iterable):
        raise RatelError("is not an iterable of batches", field="evaluate", value=type(batches).__name__,
                         remedy="Give a list of them")
    total, weight = 0.0, 0
    core.parts.set_training(False)
    try:
        for given in interrupt.each_outside(batches):
            for loss, targets in _evaluated(core, given):
                total, weight = total + loss * targets, weight + targets
    finally:
        core.parts.set_training(True)
        core.accuracy = core.parts.task_runner.take_accuracy() if core.parts.task else None
        if core.meter is not None:
            core.meter.read()  # an evaluation's work is not the next step's
    if weight == 0:
        raise RatelError("there is no target token to evaluate on", field="eval_data")
    return total / weight


def _evaluated(core: Core, given: Any) -> Iterable[tuple[float, int]]:
    """The mean loss and the targets of each piece that the session has room for."""
    batch = ready_for(core, given)
    for part in batch.cut(core.capacity.rows):
        core.capacity.check(part)
        core.flush()
        if part.targets:
            with core.protected():
                micro_batches = part.split(core.plan.work.micro_rows, core.device)
                loss = core.training.evaluate(micro_batches, targets=part.targets)
            yield loss, part.targets
