"""Taking up a run where its newest state stands: what is read, what is cut off, what is refused."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from ratel.errors import DamagedError, RatelError, WorkerError
from ratel.models.checkpoints.settings import differing, settings_of
from ratel.reading import open_regular, parse_json, read_regular
from ratel.runtime.session.session import Session
from ratel.runtime.states.format import DamagedStateError, MissingFileError
from ratel.runtime.states.saved_state import MOUNT_IT, SavedState
from ratel.schema import SchemaError, anything, boolean, check, mapping, nullable, number, record, text, whole
from ratel.synced import replace_synced
from ratel.training.loop import Progress
from ratel.training.options import read_run
from ratel.training.output import RunDirectory, being_written


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """The state a run continues from. ``extra`` is what `Session.save` was given with it."""

    out: RunDirectory
    state: Path
    options: dict[str, Any]
    extra: dict[str, Any]

    @property
    def step(self) -> int:
        return self.extra["step"]


def check_is_there(out: RunDirectory) -> None:
    """Before anything is made for the run: a drive that is mounted elsewhere now would get an empty
    directory in its place."""
    if out.is_being_written:  # whose states go while they are read, as if they were damaged
        raise being_written(out.path)
    state = out.states.newest()
    if state is not None:
        with naming_an_older(out, state):
            SavedState(state, out.states.folders).check_files()


def take_up(out: RunDirectory, session: Session) -> Resumption:
    """Load the newest state of ``out`` into the session. Nothing is changed on disk."""
    if out.is_being_written:
        raise being_written(out.path)
    options = read_run(out.path)
    state = out.states.newest()
    if state is None:
        raise RatelError(f"there is no complete state in {out.states.path}", field="--resume",
                         remedy="States are written by --save-every N; without one, start anew with --overwrite")
    with naming_an_older(out, state):
        extra = session.load(state)
    if not {"step", "data"} <= extra.keys():
        raise RatelError("was not saved by `ratel train`", field="--resume", value=state,
                         remedy="Load it with Session.load")
    with naming_an_older(out, state):
        _check_extra(extra, state)
    _check_settings(extra.get("model"), session)
    return Resumption(out=out, state=state, options=options, extra=extra)


MOST_STEPS = 10**8
"""More than any run makes; whoever resumes counts them."""

_EXTRA = record({"step": whole(0, MOST_STEPS), "data": mapping(text(), anything), "micro_batch": whole(1),
                 "has_tokenizer": boolean, "chat_template": anything},
                {"model": mapping(text(), anything), "versions": mapping(text(), text())}, is_open=True)
_LOSS = nullable(number())
_METRICS = record({"step": whole(1, MOST_STEPS), "loss": _LOSS, "grad_norm": _LOSS, "tokens": whole(), "step_s": number(0),
                   "bound_s": nullable(number(0)), "bound_by": nullable(text()), "skipped": boolean},
                  {"eval_loss": _LOSS}, is_open=True)


def _check_extra(extra: dict[str, Any], state: Path) -> None:
    try:
        check(extra, _EXTRA, "extra")
    except SchemaError as error:
        raise DamagedStateError(f"its commit record is damaged: {error}", value=state) from error


def _check_settings(before: dict[str, Any] | None, session: Session) -> None:
    """The weights come from the state, but what they are computed with is the model's."""
    found = differing(before or {}, settings_of(getattr(session.parts.module, "config", None)))
    if found:
        raise RatelError(f"its configuration is not that of the run to be continued: {'; '.join(found[:4])}", field="--model",
                         value=session.parts.name, remedy="Give the model that the run was started with, or start a new run with "
                         "--model OUT/model (`ratel export` writes it from a state)")


@contextmanager
def naming_an_older(out: RunDirectory, state: Path) -> Iterator[None]:
    """A damaged state is never passed over silently: steps would be lost. The message says how to
    go back."""
    try:
        yield
    except (DamagedStateError, DamagedError) as error:
        way_back = f"{_way_back(out, state)}, and check the drive"
        is_elsewhere = isinstance(error, MissingFileError)
        raise RatelError(error.message, field="--resume", value=getattr(error, "value", None) or error.path,
                         remedy=f"{MOUNT_IT}; if it is lost: {way_back[0].lower()}{way_back[1:]}" if is_elsewhere else way_back) from error


@contextmanager
def saying_what_next(out: RunDirectory) -> Iterator[None]:
    """Damage that training finds may be in the bytes on the drive or in their transfer: only
    reading again can tell."""
    try:
        yield
    except (WorkerError, DamagedError) as error:
        newest = out.states.newest()
        if not isinstance(error.__cause__ or error, DamagedError) or newest is None:
            raise
        advice = f"Continue with --resume; if that finds the same damage: {_way_back(out, newest)}, and check the drive"
        raise WorkerError(f"{error}. {advice}") from (error.__cause__ or error)


def _way_back(out: RunDirectory, state: Path) -> str:
    older = out.states.before(state)
    return (f"Remove {state} to resume from {older} (`rm -r {quote(str(state))}`, then --resume)" if older is not None else
            "There is no older state in it: start anew with --overwrite")


def cut_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut metrics.jsonl off after the last line of ``step`` or before: what follows will be made
    again. Returns the records that stay. Lines among them that are none stay, too, and count for
    nothing."""
    records: list[dict[str, Any]] = []
    position = end = 0
    if not path.is_file():
        return records
    with open_regular(path) as file:
        while line := file.readline(_LONGEST_LINE):
            position += len(line)
            found = _record(line)
            if found is not None and found["step"] <= step:
                records.append(found)
                end = position
    os.truncate(path, end)
    return records


def amend_last(path: Path, more: dict[str, float]) -> None:
    """Add to the last record of metrics.jsonl. The file is replaced as a whole."""
    lines = read_regular(path, _LARGEST_METRICS).splitlines(keepends=True) if path.is_file() else []
    last = _record(lines[-1]) if lines else None
    if last is None:
        return
    plain = {name: value if math.isfinite(value) else None for name, value in more.items()}
    replace_synced(path, b"".join(lines[:-1]) + json.dumps({**parse_json(lines[-1]), **plain}).encode() + b"\n")


_LONGEST_LINE = 1 << 20
_LARGEST_METRICS = 1 << 36


def _record(line: bytes) -> dict[str, Any] | None:
    """None for a line that a kill or a power failure cut short. JSON has no NaN: null stands for
    it."""
    try:
        found = check(parse_json(line), _METRICS)
    except ValueError:
        return None
    if not line.endswith(b"\n"):
        return None
    return {**found, **{name: math.nan for name in ("loss", "grad_norm", "eval_loss") if found.get(name, 0) is None}}


def replay(records: list[dict[str, Any]], step: int) -> Progress:
    """How far the run had come after ``step``. Steps without a record have a loss that is not known
    (NaN)."""
    by_step = {record["step"]: record for record in records}
    progress = Progress()
    for number in range(1, step + 1):
        progress.add(by_step.get(number, _UNKNOWN | {"step": number}))
    progress.steps_before = step
    return progress


_UNKNOWN = {"loss": math.nan, "tokens": 0, "step_s": 0.0, "bound_s": 0.0, "bound_by": None, "skipped": False}
