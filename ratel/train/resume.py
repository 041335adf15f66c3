"""Taking up a run where its newest state stands: what is read, what is cut off, what is refused."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratel.errors import DamagedError, RatelError, WorkerError
from ratel.runtime.durable_files import sync_path, write_synced
from ratel.runtime.session import Session
from ratel.runtime.state_format import DamagedStateError
from ratel.train.loop import Progress
from ratel.train.options import read_earlier
from ratel.train.output import RunDirectory, being_written


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


def take_up(out: RunDirectory, session: Session) -> Resumption:
    """Load the newest state of ``out`` into the session. Nothing is changed on disk."""
    if out.is_being_written:  # whose states go while they are read, as if they were damaged
        raise being_written(out.path)
    options = read_earlier(out.path)
    state = out.states.newest()
    if state is None:
        raise RatelError(f"there is no complete state in {out.states.path}", field="--resume",
                         remedy="States are written by --save-every N; without one, start anew with --overwrite")
    with naming_an_older(out, state):
        extra = session.load(state)
    if not {"step", "data"} <= extra.keys():
        raise RatelError("was not saved by `ratel train`", field="--resume", value=state,
                         remedy="Load it with Session.load")
    return Resumption(out=out, state=state, options=options, extra=extra)


@contextmanager
def naming_an_older(out: RunDirectory, state: Path) -> Iterator[None]:
    """A damaged state is never passed over silently: steps would be lost. The message says how to go back."""
    try:
        yield
    except (DamagedStateError, DamagedError) as error:
        raise RatelError(error.message, field="--resume", value=getattr(error, "value", None) or error.path,
                         remedy=f"{_way_back(out, state)}, and check the drive") from error


@contextmanager
def saying_what_next(out: RunDirectory) -> Iterator[None]:
    """Damage that training finds may be in the bytes on the drive or in their transfer: only reading again can tell."""
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
    return (f"Remove {state} to resume from {older}" if older is not None else
            "There is no older state in it: start anew with --overwrite")


def cut_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut metrics.jsonl off after ``step``: what follows will be made again. Returns the records that stay."""
    records: list[dict[str, Any]] = []
    num_bytes = 0
    if not path.is_file():
        return records
    with open(path, "rb") as file:
        for line in file:
            record = _record(line)
            if record is None or record["step"] > step:
                break
            records.append(record)
            num_bytes += len(line)
    os.truncate(path, num_bytes)
    return records


def amend_last(path: Path, more: dict[str, float]) -> None:
    """Add to the last record of metrics.jsonl. The file is replaced as a whole."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if not lines:
        return
    plain = {name: value if math.isfinite(value) else None for name, value in more.items()}
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    write_synced(partial, b"".join(lines[:-1]) + json.dumps({**json.loads(lines[-1]), **plain}).encode() + b"\n")
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Have the file on the disk when this returns, under its name."""
    sync_path(path)
    sync_path(path.parent)


def _record(line: bytes) -> dict[str, Any] | None:
    """None for a line that a kill or a power failure cut short. JSON has no NaN: null stands for it."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not line.endswith(b"\n") or not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return {**record, **{name: math.nan for name in ("loss", "grad_norm") if record[name] is None}}


def replay(records: list[dict[str, Any]], step: int) -> Progress:
    """How far the run had come after ``step``. Steps without a record have a loss that is not known (NaN)."""
    by_step = {record["step"]: record for record in records}
    progress = Progress()
    for number in range(1, step + 1):
        progress.add(by_step.get(number, _UNKNOWN | {"step": number}))
    progress.steps_before = step
    return progress


_UNKNOWN = {"loss": math.nan, "tokens": 0, "step_s": 0.0, "bound_s": 0.0, "bound_by": None, "skipped": False}
