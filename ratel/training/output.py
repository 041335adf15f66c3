"""The run's directory: what it holds, when it may be used again, how a file appears in it."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ratel.config import TrainConfig
from ratel.errors import RatelError
from ratel.ownership import exports
from ratel.runtime.states.commits import Folders
from ratel.runtime.states.durable_files import existing_part, make_directory
from ratel.runtime.states.format import DamagedStateError, MissingFileError
from ratel.runtime.states.saved_state import MOUNT_IT
from ratel.synced import replace_synced
from ratel.training.claims import EXPORTED, JSON_FILES, METRICS, check_inputs, check_out, is_empty, is_runs, marked, results
from ratel.training.states import StateDirectory

_REMEDY = "Give a directory that you may write to, or that can be made"


class RunDirectory:
    """``OUT``. Only what is known to be a run's, by content, is ever replaced or removed; anything
    else in it is the user's.

    One run at a time: from ``open`` until the context ends the directory itself is locked. The
    kernel gives the lock of a process that died back, so that none can be stale.
    """

    def __init__(self, path: Path, folders: Folders = ()) -> None:
        """``folders``: the SSD directories of the run."""
        self.path = path
        self._lock: int | None = None
        self.metrics, self.model, self.adapter = path / METRICS, path / "model", path / "adapter"
        self.states = StateDirectory(path / "state", folders)

    def earlier_results(self) -> list[str]:
        return results(self.path, self.states)

    def holds_run(self) -> bool:
        """More than what is written before a run's first step, which one that failed there
        leaves."""
        found = {"startup.json", *EXPORTED, "state", METRICS} & set(self.earlier_results())
        return bool(found - ({METRICS} if is_empty(self.metrics) else set()))

    def check(self, config: TrainConfig) -> None:
        """Refuse what the run would have to write over or remove though it is somebody else's, or
        read by the run itself."""
        check_inputs(self.path, config)
        check_out(self.path, self.states, ends_with=exported(config), saves=bool(config.save_every), resumes=config.resume)

    def open(self, *, keep_results: bool = False, config: TrainConfig | None = None,
             note: Callable[[str], None] = lambda line: None) -> None:
        """Make the directory and remove an earlier run's results, so that none is mistaken for this
        run's; ``note`` is told of them before. With ``config`` all is checked once more, now that
        nobody else is at it."""
        try:
            make_directory(self.path)
            self._take_lock()
            if config is not None:
                self.check(config)
            if not keep_results:
                self._remove_results(note)
        except OSError as error:
            raise RatelError(f"cannot be used: {error.strerror}", field="--out", value=self.path, remedy=_REMEDY) from error

    def _remove_results(self, note: Callable[[str], None]) -> None:
        found = self.earlier_results()
        ssd_files = self.states.ssd_files()
        if found:
            note(f"removing the earlier run in {self.path}: {', '.join([*found, *ssd_files])}")
        self.states.drop_all()
        for directory in (self.model, self.adapter):
            exports.remove_export(directory)
        for name in (METRICS, *JSON_FILES):
            if is_runs(self.path, name):
                os.unlink(self.path / name)

    def _take_lock(self) -> None:
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise being_written(self.path) from error

    @property
    def is_being_written(self) -> bool:
        """Whether a run in another process writes to this directory."""
        try:
            there = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(there, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(there)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Whole or not at all: a reader never sees half a file."""
        file = f"{name}.json"
        replace_synced(self.path / file, (json.dumps(marked(file, content), indent=2, default=str) + "\n").encode())


def exported(config: TrainConfig) -> str | None:
    """The directory in OUT of what the run ends with, if it is to be written."""
    return None if not config.export else "model" if config.lora is None else "adapter"


def being_written(out: Path) -> RatelError:
    return RatelError("another run is writing to it", field="--out", value=out,
                      remedy="Wait for that run, or give another directory")


def choose(out: str | None, model_name: str, *, may_exist: bool, folders: Folders = ()) -> RunDirectory:
    """The directory for a run: ``out``, or without one the first free ``runs/MODEL``,
    ``runs/MODEL-2``, ...

    Nothing is touched yet: `RunDirectory.open` does that once the run is known to start.
    """
    path = Path(out) if out is not None else _first_free(Path("runs"), model_name)
    existing = existing_part(path)
    if not existing.is_dir():
        raise RatelError("is not a directory", field="--out", value=existing)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RatelError("is not writable", field="--out", value=path, remedy=_REMEDY)
    directory = RunDirectory(path, folders)
    if directory.holds_run() and not may_exist:
        raise RatelError(f"already holds a run ({', '.join(directory.earlier_results())})", field="--out", value=path,
                         remedy=f"Give another directory, {_resumable(directory)}or --overwrite to replace that run")
    return directory


def _resumable(directory: RunDirectory) -> str:
    return "--resume to continue that run, " if directory.states.newest() else ""


def _first_free(parent: Path, name: str) -> Path:
    number, path = 1, parent / name
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


@contextmanager
def beside_a_run(state: Path, field: str) -> Iterator[None]:
    """What reads a state while its run goes on may meet one that is being written over: that is no
    damage."""
    try:
        yield
    except DamagedStateError as error:
        run = RunDirectory(state.parent.parent)
        if run.is_being_written:
            raise RatelError("was written over by its run, which goes on", field=field, value=state,
                             remedy="Do it again when that run has ended, or make states last by copies: --durable checkpoint") from error
        older = run.states.before(state)
        way_back = f"use {older}, the state before it" if older is not None else "there is no older state beside it"
        remedy = f"{MOUNT_IT}; else {way_back}" if isinstance(error, MissingFileError) else f"Check the drive; {way_back}"
        raise RatelError(error.message, field=field, value=error.value, remedy=remedy) from error
