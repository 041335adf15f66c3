"""The training loop: one step after another, each recorded, until the steps, the data or the user's
patience end."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from ratel import interrupt
from ratel.errors import NonFiniteError, RatelError
from ratel.interrupt import Finishing
from ratel.trace.timeline import Timeline
from ratel.training.schedule import Schedule

MAX_SKIPPED_IN_A_ROW = 10
TRACED_STEP = 3
"""The step of a start that is traced: the first one imports and has no updates to wait for, the
second one has all buffers still empty."""
_NONE_LEFT = object()


class Trainer(Protocol):
    """What the loop needs of a `ratel.Session`."""

    def step(self, batch: Any, lr: float | None = None, **options: Any) -> Any: ...

    accuracy: float | None

    def evaluate(self, batches: Iterable[Any]) -> float: ...


@dataclass(kw_only=True)
class Progress:
    """What has been done so far; complete at any moment between two steps."""

    losses: list[float] = field(default_factory=list)
    eval_losses: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    train_s: float = 0.0
    bound_s: float = 0.0
    bound_by: dict[str, int] = field(default_factory=dict)
    skipped_in_a_row: int = 0
    steps_before: int = 0
    """How many of these steps were made before the run was resumed."""

    @property
    def steps(self) -> int:
        return len(self.losses)

    def is_best(self) -> bool:
        """Whether the last step was evaluated, and better than any before."""
        loss = self.eval_losses.get(self.steps, math.nan)
        return not any(other <= loss for step, other in self.eval_losses.items() if step < self.steps) and loss == loss

    def add(self, record: dict[str, Any]) -> None:
        """Count a step by its metrics."""
        self.losses.append(record["loss"])
        self.tokens += record["tokens"]
        self.train_s += record["step_s"]
        self.bound_s += record["bound_s"] or 0.0
        if record["bound_by"]:
            self.bound_by[record["bound_by"]] = self.bound_by.get(record["bound_by"], 0) + 1
        if "eval_loss" in record:
            self.eval_losses[record["step"]] = record["eval_loss"]
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record["skipped"] else 0


@dataclass(frozen=True, kw_only=True)
class Loop:
    """``evaluation`` gives the held-out batches anew at each call; ``record`` takes one metrics
    object per step.

    ``save`` is called every ``save_every`` steps, and where the loop ends; ``save_best`` after an
    evaluation that is the best so far.
    """

    session: Trainer
    steps: int
    schedule: Schedule
    record: Callable[[dict[str, Any]], None]
    stop: Finishing
    evaluation: Callable[[], Iterable[Any]] | None = None
    eval_every: int = 0
    tries_evaluation: bool = False
    """Whether the first batch of an evaluation is evaluated after the first step, too: what cannot
    be shall end a run then and not after its last."""
    save: Callable[[Progress], None] | None = None
    save_every: int = 0
    save_best: Callable[[Progress], None] | None = None
    traced: Callable[[Timeline], None] | None = None
    """Takes the record of the step numbered TRACED_STEP, or of the last one of fewer."""

    def run(self, batches: Iterator[Any], progress: Progress) -> None:
        """Fill ``progress``. Ends early when ``batches`` does or when a stop was requested."""
        saved_at, first = progress.steps, progress.steps + 1
        while not self._is_over(progress):
            batch = next(batches, _NONE_LEFT)
            if batch is _NONE_LEFT:
                break
            self._step(batch, progress)
            if self.tries_evaluation and progress.steps == first:
                self._try_evaluation(progress)
            if progress.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise _diverged(progress.skipped_in_a_row, progress.steps)
            if self.save_best is not None and progress.is_best():
                self.save_best(progress)
            if self.save is not None and self.save_every and progress.steps % self.save_every == 0:
                self.save(progress)
                saved_at = progress.steps
        if self.save is not None and progress.steps != saved_at:
            self.save(progress)

    def _is_over(self, progress: Progress) -> bool:
        return progress.steps >= self.steps or self.stop.requested

    def evaluate_late(self, progress: Progress) -> bool:
        """Make the evaluation due after the last step, if a stop was requested before it. Whether
        it was made."""
        number = progress.steps
        if number == 0 or number in progress.eval_losses or not self._evaluates_after(number):
            return False
        self._evaluate(number, {}, progress)
        return number in progress.eval_losses

    def _step(self, batch: Any, progress: Progress) -> None:
        number = progress.steps + 1
        try:
            trace = {"trace": True} if self._is_traced(number, progress) else {}
            out = self.session.step(batch, lr=self.schedule(number - 1), **trace)
        except NonFiniteError as error:
            raise RatelError(f"step {number} has a gradient that is not finite, and part of the update was made",
                             field="--optimizer", value="eager", remedy=_ADVICE) from error
        interrupt.check()
        record = describe_step(number, out)
        progress.add(record)
        if trace:
            self.traced(out.timeline)
        if self._evaluates_after(number):
            self._evaluate(number, record, progress)
        self.record(record)

    def _is_traced(self, number: int, progress: Progress) -> bool:
        return self.traced is not None and number == min(progress.steps_before + TRACED_STEP, self.steps)

    def _evaluates_after(self, number: int) -> bool:
        if self.evaluation is None or self.stop.requested:
            return False
        return number == self.steps or (self.eval_every > 0 and number % self.eval_every == 0)

    def _evaluate(self, number: int, record: dict[str, Any], progress: Progress) -> None:
        loss = self.session.evaluate(self._until_stopped(self.evaluation()))
        if not self.stop.requested:  # a mean over a part of the batches is not comparable
            progress.eval_losses[number] = loss
            record.update(self.evaluated(loss))

    def evaluated(self, loss: float) -> dict[str, float]:
        """What metrics.jsonl says of the last evaluation."""
        accuracy = self.session.accuracy
        return {"eval_loss": loss} if accuracy is None else {"eval_loss": loss, "eval_accuracy": accuracy}

    def _try_evaluation(self, progress: Progress) -> None:
        if self.evaluation is not None and progress.steps not in progress.eval_losses and not self.stop.requested:
            self.session.evaluate(islice(self.evaluation(), 1))

    def _until_stopped(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches until somebody asks to stop; at least one, so that there is a mean to
        take."""
        for batch in batches:
            yield batch
            if self.stop.requested:
                return


_ADVICE = ("Lower --lr, lengthen --warmup-steps or clip with --max-grad-norm 1.0; --optimizer deferred skips such a "
           "step; if it happens at the first step, look at the data and the imported weights, and try --dtype fp32")


def _diverged(count: int, step: int) -> RatelError:
    return RatelError(f"the loss or the gradients were not finite for {count} steps in a row, up to step {step}; "
                      "these steps changed nothing", field="training", remedy=_ADVICE)


def describe_step(number: int, out: Any) -> dict[str, Any]:
    """One object of metrics.jsonl."""
    return {
        "step": number,
        "loss": out.loss,
        "grad_norm": out.grad_norm,
        "lr": out.lr,
        "tokens": out.tokens,
        "step_s": out.seconds,
        "tokens_per_s": out.tokens / out.seconds if out.seconds else 0.0,
        "bound_s": out.bound_s,
        "bound_by": out.bound_by,
        "skipped": out.skipped,
        "early_units": out.early_units,
        "redone_units": out.redone_units,
        "ssd_read_bytes": out.usage.ssd_read_bytes,
        "ssd_written_bytes": out.usage.ssd_written_bytes,
    }
