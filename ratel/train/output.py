"""The run's directory: what it holds, when it may be used again, how a file appears in it."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

from ratel.errors import RatelError
from ratel.runtime.durable_files import existing_part, make_directory, sync_path, write_synced
from ratel.runtime.state_format import DamagedStateError
from ratel.train.states import StateDirectory

RESULTS = ("config.json", "plan.json", "hardware.json", "startup.json", "metrics.jsonl", "model", "model.partial", "state")
_REMEDY = "Give a directory that you may write to, or that can be made"


class RunDirectory:
    """``OUT``. Only the files of a run are ever replaced or removed; anything else in it is the user's.

    One run at a time: from ``open`` until the context ends the directory itself is locked. The kernel gives the lock of a
    process that died back, so that none can be stale.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self.metrics, self.model = path / "metrics.jsonl", path / "model"
        self.states = StateDirectory(path / "state")

    def earlier_results(self) -> list[str]:
        return [name for name in RESULTS if (self.path / name).exists()]

    def holds_run(self) -> bool:
        """More than what is written before a run's first step, which one that failed there leaves."""
        metrics = self.metrics
        return any((self.path / name).exists() for name in RESULTS if name.startswith(("startup", "model", "state"))) or (
            metrics.exists() and metrics.stat().st_size > 0)

    def open(self, *, keep_results: bool = False) -> None:
        """Make the directory and remove an earlier run's results, so that none is mistaken for this run's."""
        try:
            make_directory(self.path)
            self._take_lock()
            if not keep_results:
                self.states.drop_commits()
            for name in [] if keep_results else self.earlier_results():
                _remove(self.path / name)
        except OSError as error:
            raise RatelError(f"cannot be used: {error.strerror}", field="--out", value=self.path, remedy=_REMEDY) from error

    def _take_lock(self) -> None:
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise being_written(self.path) from error

    @property
    def is_being_written(self) -> bool:
        """By a run in another process."""
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

    def write_json(self, name: str, content: Any) -> None:
        """Whole or not at all: a reader never sees half a file."""
        target = self.path / f"{name}.json"
        partial = target.with_suffix(".json.partial")
        partial.unlink(missing_ok=True)
        write_synced(partial, (json.dumps(content, indent=2, default=str) + "\n").encode())
        os.replace(partial, target)
        sync_path(self.path)  # --resume reads them: after a power failure they are there, and whole


def being_written(out: Path) -> RatelError:
    return RatelError("another run is writing to it", field="--out", value=out,
                      remedy="Wait for that run, or give another directory")


def choose(out: str | None, model_name: str, *, may_exist: bool) -> RunDirectory:
    """The directory for a run: ``out``, or without one the first free ``runs/MODEL``, ``runs/MODEL-2``, ...

    Nothing is touched yet: `RunDirectory.open` does that once the run is known to start.
    """
    path = Path(out) if out is not None else _first_free(Path("runs"), model_name)
    existing = existing_part(path)
    if not existing.is_dir():
        raise RatelError("is not a directory", field="--out", value=existing)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RatelError("is not writable", field="--out", value=path, remedy=_REMEDY)
    directory = RunDirectory(path)
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


def _remove(path: Path) -> None:
    rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def beside_a_run(state: Path, field: str) -> Iterator[None]:
    """What reads a state while its run goes on may meet one that is being written over: that is no damage."""
    try:
        yield
    except DamagedStateError as error:
        run = RunDirectory(state.parent.parent)
        if not run.is_being_written:
            raise
        raise RatelError("was written over by its run, which goes on", field=field, value=state,
                         remedy="Do it again when that run has ended, or make states last by copies: --durable checkpoint") from error
