"""One training run from its options to its results: the function behind ``ratel.train`` and ``ratel
train``."""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.nn import Module

from ratel import interrupt
from ratel.config import NEXT_TOKEN, TrainConfig
from ratel.errors import RatelError
from ratel.hardware.determinism import same_bits
from ratel.hardware.device import choose_dtype, require_device
from ratel.interrupt import Interrupted
from ratel.lora.request import adapter_request, described
from ratel.models.calls.tasks import Task
from ratel.models.load import is_causal_lm
from ratel.monitor.progress import ProgressDisplay
from ratel.planner.search.options import SessionOptions
from ratel.runtime.session.session import Session
from ratel.startup.ahead import await_kernels, begin_ahead, end_ahead, remember_arena
from ratel.trace import phases
from ratel.training.attempt import Attempt, TrainResult
from ratel.training.inputs import is_text, open_inputs
from ratel.training.options import complete
from ratel.training.output import choose
from ratel.training.resume import check_is_there, take_up
from ratel.training.task_inputs import open_task

log = logging.getLogger(__name__)


def train(model: Any, data: Any = None, *, loss_fn: Callable[[Any, Any], Any] | None = None, tokenizer: Any = None,
          eval_data: Any = None, config: str | os.PathLike[str] | None = None, **options: Any) -> TrainResult:
    """Fine-tune ``model`` and write the results to a directory, as ``ratel train`` does.

    ``model``: a Hugging Face directory, the name of a preset, a transformers model or
    configuration, or any nn.Module with repeated blocks; the last needs ``loss_fn(model, batch)``,
    which returns the batch's mean loss as a scalar. The trained weights are also put back into a
    model that was given as an object; with ``lora`` it is given back as it came, and the adapter is
    in OUT/adapter. ``data``: text files (see docs/data.md) or an iterable of
    batches; without it, the bundled text. ``eval_data``: the same, held out; of batches the first
    one is also evaluated after the first step, so that a mistake in them ends the run there.
    ``config``: a TOML file; ``options``: whatever ``ratel train --help`` lists, with ``_`` for
    ``-``. With ``resume``, give the same model, and the same batches from their beginning: as many
    as the run had taken are passed over. Raises RatelError for a mistake in any of them, before
    anything is written.
    """
    named = {"model": _name_of(model), "data": _name_of(data), "eval_data": _name_of(eval_data)}
    given = {name: value for name, value in {**options, **named, "tokenizer": _name_of(tokenizer)}.items()
             if value is not None}
    given |= {"lora": described(options["lora"], "--lora")} if options.get("lora") is not None else {}
    return run(complete(given, config), model=model, data=data, loss_fn=loss_fn, tokenizer=tokenizer,
               eval_data=eval_data)


def run(config: TrainConfig, *, model: Any, data: Any = None, loss_fn: Any = None, tokenizer: Any = None,
        eval_data: Any = None) -> TrainResult:
    """As `train`, with the options resolved; objects stand in for what ``config`` can only name."""
    with interrupt.watching():
        return _watched(config, model, data, loss_fn, tokenizer, eval_data)


def _watched(config: TrainConfig, model: Any, data: Any, loss_fn: Any, tokenizer: Any, eval_data: Any) -> TrainResult:
    try:
        begin_ahead(config)
        await_kernels()
        with same_bits(config.deterministic):
            return _run(config, model, data, loss_fn, tokenizer, eval_data)
    finally:
        end_ahead()  # a caller that goes on after a refusal needs its memory


def _run(config: TrainConfig, model: Any, data: Any, loss_fn: Any, tokenizer: Any, eval_data: Any) -> TrainResult:
    if data is None and config.data is None and tokenizer is None and isinstance(model, Module) and not is_causal_lm(model):
        raise RatelError("is missing: what a module with its own loss learns from is not known", field="data",
                         remedy="Give batches as loss_fn takes them")
    as_given = config  # as the next start will know it, before PyTorch can say what "auto" is
    if config.dtype == "auto":
        config = replace(config, dtype=choose_dtype(require_device(config.device)))
    adapter_request(config)
    out = choose(config.out, Path(config.model or "model").name, may_exist=config.overwrite or config.resume,
                 folders=config.ssd)
    out.check(config)
    if config.resume:
        check_is_there(out)
    given = {"data": data if data is not None else config.data,
             "eval_data": eval_data if eval_data is not None else config.eval_data,
             "tokenizer": tokenizer if tokenizer is not None else config.tokenizer}
    task = open_task(config, model=model, **given) if config.task != NEXT_TOKEN and is_text(given["data"]) else None
    with ProgressDisplay(config.steps, log_every=config.log_every, quiet=config.quiet) as display, out:
        with open_session(config, model, loss_fn, commits=out.states.commits, task=task and task.task) as session:
            if loss_fn is None and not config.unchecked:
                check_family(session, display)
            if task is not None:
                config = task.fitted(config, session.parts)
            earlier = take_up(out, session) if config.resume else None
            vocab_size = session.parts.spec.vocab_size if session.parts.is_causal_lm else None
            begun_s = phases.age_s()
            with open_inputs(config, model=model, **given, vocab_size=vocab_size,
                             position=earlier.extra["data"] if earlier else None,
                             task=task, parts=session.parts, listed=out.path / "documents.json") as inputs:
                phases.note("data", begun_s)
                attempt = Attempt(config, session, inputs, out, display, earlier)
                attempt.prepare()
                if attempt.is_planned:
                    remember_arena(as_given, session.plan.arena_bytes)
                result = attempt.complete()
    # Only now: a session that is left by an interrupt takes its last step for a broken one.
    if result.is_interrupted:
        raise Interrupted(f"stopped after step {result.steps} of {config.steps}; {out.path} is complete up to there"
                          f"{', and --resume continues' if config.save_every else ''}", result)
    return result


def check_family(session: Session, display: ProgressDisplay) -> None:
    """Raises RatelError if a small copy of the model is trained wrongly, as was found out now or
    before."""
    from ratel.verify.known import quick_verdict, refuse_wrong

    task = session.parts.task.name if session.parts.task else NEXT_TOKEN
    with phases.phase("what is known of the family"):
        verdict = quick_verdict(session.parts.module, task, display.note)
    if verdict is None:
        return
    refuse_wrong(verdict)
    if verdict.refused:
        log.info("a small copy of %s could not be checked: %s", verdict.name, verdict.refused)


def open_session(config: TrainConfig, model: Any, loss_fn: Any, commits: Path | None = None,
                 task: Task | None = None) -> Session:
    others: dict[str, Any] = {"task": task or config.task, "commits": commits}
    if commits is None:
        others["durable"] = "off"
    if config.resume:
        others["optimizer_state"] = None  # the state that a run resumes from has moments of its own
    return Session(model, loss_fn=loss_fn, **SessionOptions.of(config, **others).given)


def _name_of(thing: Any) -> str | None:
    """How config.json names what was given: a path as it is, an object by its type."""
    if thing is None:
        return None
    if isinstance(thing, (str, os.PathLike)):
        return os.fspath(thing)
    if is_text(thing) and isinstance(thing, Iterable):
        return ",".join(map(os.fspath, thing))
    return type(thing).__name__
