"""One training run from its options to its results: the function behind ``ratel.train`` and ``ratel train``."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ratel.config import TrainConfig, resolve
from ratel.hardware.device import choose_dtype, require_device
from ratel.hardware.doctor import describe_cuda
from ratel.hardware.host import describe_host
from ratel.monitor.metrics import MetricsWriter
from ratel.monitor.progress import ProgressDisplay
from ratel.runtime.session import Session
from ratel.train.inputs import Inputs, is_text, open_inputs
from ratel.train.interrupt import Interrupted, StopRequest
from ratel.train.loop import Loop, Progress
from ratel.train.output import RunDirectory, choose
from ratel.train.schedule import make_schedule
from ratel.train.summary import summarize


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run did. ``losses`` has one entry per step, ``eval_losses`` one per evaluation, by step."""

    losses: list[float]
    eval_losses: dict[int, float]
    steps: int
    tokens: int
    seconds: float
    out: Path
    is_interrupted: bool = False


def train(model: Any, data: Any = None, *, loss_fn: Callable[[Any, Any], Any] | None = None, tokenizer: Any = None,
          eval_data: Any = None, config: str | os.PathLike[str] | None = None, **options: Any) -> TrainResult:
    """Fine-tune ``model`` and write the results to a directory, as ``ratel train`` does.

    ``model``: a Hugging Face directory, the name of a preset, a transformers model or configuration, or any nn.Module
    with repeated blocks; the last needs ``loss_fn(model, batch)``, which returns the batch's mean loss as a scalar. The
    trained weights are also put back into a model that was given as an object. ``data``: text files (see docs/data.md)
    or an iterable of batches; without it, the bundled text.
    ``config``: a TOML file; ``options``: whatever ``ratel train --help`` lists, with ``_`` for ``-``.
    Raises RatelError for a mistake in any of them, before anything is written.
    """
    named = {"model": _name_of(model), "data": _name_of(data), "eval_data": _name_of(eval_data)}
    given = {name: value for name, value in {**options, **named, "tokenizer": _name_of(tokenizer)}.items()
             if value is not None}
    return run(resolve(given, config), model=model, data=data, loss_fn=loss_fn, tokenizer=tokenizer,
               eval_data=eval_data)


def run(config: TrainConfig, *, model: Any, data: Any = None, loss_fn: Any = None, tokenizer: Any = None,
        eval_data: Any = None) -> TrainResult:
    """As `train`, with the options resolved; objects stand in for what ``config`` can only name."""
    if config.dtype == "auto":
        config = replace(config, dtype=choose_dtype(require_device(config.device)))
    out = choose(config.out, Path(config.model or "model").name, overwrite=config.overwrite)
    with ProgressDisplay(config.steps, log_every=config.log_every, quiet=config.quiet) as display:
        with open_session(config, model, loss_fn) as session:
            vocab_size = session.parts.spec.vocab_size if session.parts.is_causal_lm else None
            with open_inputs(config, model=model, data=data if data is not None else config.data,
                             eval_data=eval_data if eval_data is not None else config.eval_data,
                             tokenizer=tokenizer if tokenizer is not None else config.tokenizer,
                             vocab_size=vocab_size) as inputs:
                attempt = _Run(config, session, inputs, out, display)
                attempt.prepare()
                result = attempt.complete()
    # Only now: a session that is left by an interrupt takes its last step for a broken one.
    if result.is_interrupted:
        raise Interrupted(f"stopped after step {result.steps} of {config.steps}; {out.path} is complete up to there",
                          result)
    return result


def open_session(config: TrainConfig, model: Any, loss_fn: Any) -> Session:
    names = ("gpu_memory", "dram", "device", "dtype", "lr", "betas", "eps", "weight_decay", "max_grad_norm",
             "optimizer", "micro_batch", "seed", "ssd_bandwidth", "io_backend", "tier", "checkpoint_tier", "direct",
             "optimizer_threads", "attention")
    options = {name: getattr(config, name) for name in names}
    return Session(model, ssd=list(config.ssd) or None, loss_fn=loss_fn, **options)


class _Run:
    """A run with all its parts open: what is to be done before the loop, around it and after it."""

    def __init__(self, config: TrainConfig, session: Session, inputs: Inputs, out: RunDirectory,
                 display: ProgressDisplay) -> None:
        self.config, self.session, self.inputs, self.out, self.display = config, session, inputs, out, display
        self._is_planned = False

    def prepare(self) -> None:
        """Whatever can be refused is refused here; then the directory is this run's."""
        self._is_planned = self.session.parts.is_causal_lm and self.inputs.tokenizer is not None
        if self._is_planned:
            self.session.prepare(self.config.batch_size, self.config.seq_len)
            self.display.note(self.session.plan.describe())
        self.display.note(self.inputs.description)
        self.out.open()
        self.out.write_json("config", {**self.config.to_json(), "out": str(self.out.path)})
        if self._is_planned:
            self._write_plan()

    def complete(self) -> TrainResult:
        start, progress = time.perf_counter(), Progress()
        try:
            with StopRequest() as stop:
                self._loop(progress, stop)
                self._finish()
        except KeyboardInterrupt:
            raise Interrupted(f"stopped in step {progress.steps + 1} of {self.config.steps}; the model was not "
                              f"written, metrics are in {self.out.path}", self._result(progress, start)) from None
        result = self._result(progress, start, is_interrupted=stop.requested)
        self.display.close()
        for line in summarize(progress, result.seconds, self.out, exported=self.config.export):
            self.display.note(line)
        return result

    def _loop(self, progress: Progress, stop: StopRequest) -> None:
        config = self.config
        schedule = make_schedule(config.schedule, lr=config.lr, steps=config.steps, min_lr=config.min_lr,
                                 warmup_steps=config.num_warmup_steps)
        with MetricsWriter(self.out.metrics) as metrics:
            self.display.start()

            def record(entry: dict[str, Any]) -> None:
                metrics.write(entry)
                self.display.step(entry)

            Loop(session=self.session, steps=config.steps, schedule=schedule, record=record, stop=stop,
                 evaluation=self.inputs.evaluation, eval_every=config.eval_every).run(self.inputs.batches, progress)

    def _write_plan(self) -> None:
        self.out.write_json("plan", self.session.plan.to_json())
        self.out.write_json("hardware", {"host": describe_host(), "cuda": describe_cuda(), **self.session.hardware})

    def _finish(self) -> None:
        """Complete the updates that still wait, and write what only then is final."""
        self.session.flush()
        if not self._is_planned:
            self._write_plan()  # batches of the user's own had no shape before the first one was seen
        if self.config.export:
            self.session.export(self.out.model, dtype=self.config.dtype)
            if self.inputs.tokenizer is not None:
                self.inputs.tokenizer.save_pretrained(self.out.model)

    def _result(self, progress: Progress, start: float, *, is_interrupted: bool = False) -> TrainResult:
        return TrainResult(losses=progress.losses, eval_losses=progress.eval_losses, steps=progress.steps,
                           tokens=progress.tokens, seconds=time.perf_counter() - start, out=self.out.path,
                           is_interrupted=is_interrupted)


def _name_of(thing: Any) -> str | None:
    """How config.json names what was given: a path as it is, an object by its type."""
    if thing is None:
        return None
    if isinstance(thing, (str, os.PathLike)):
        return os.fspath(thing)
    if is_text(thing) and isinstance(thing, Iterable):
        return ",".join(map(os.fspath, thing))
    return type(thing).__name__
