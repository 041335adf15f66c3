"""OUT/state: one directory per saved step, and the records of commits. A run resumes from the newest; any is enough to
export from."""

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

from ratel.errors import RatelError
from ratel.runtime.commit_files import discard_commits, files_of
from ratel.runtime.durable_files import beside, settled
from ratel.runtime.state_format import read_commit

_NAME = re.compile(r"step-(\d{8,})")
_PART = re.compile(r"(step-\d{8,}|commits)\.(old|partial|removed)(\.planes\.0)?")
_COMPLETE = "manifest.json"


class StateDirectory:
    """A state counts once its directory has its name: until then the name is another, afterwards it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commits = path / "commits"

    def steps(self) -> list[int]:
        """The steps after which there is a complete state, ascending."""
        if not self.path.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.path.iterdir() if (entry / _COMPLETE).is_file())
        return sorted(int(match[1]) for match in matches if match)

    def path_of(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def newest(self) -> Path | None:
        steps = self.steps()
        copy = self.path_of(steps[-1]) if steps else None
        committed = self.committed_step()
        return copy if committed is None or (steps and steps[-1] > committed) else self.commits

    def committed_step(self) -> int | None:
        """The step of the newest commit; one after all others if it cannot be read, so that it is not passed over and the
        reader says why."""
        if not (settled(self.commits) / _COMPLETE).is_file():
            return None
        with suppress(RatelError, KeyError):
            return read_commit(settled(self.commits)).training["extra"]["step"]
        return sys.maxsize

    def before(self, state: Path) -> Path | None:
        """The newest copy that is older than this state."""
        older = [path for path in map(self.path_of, self.steps()) if state == self.commits or path.name < state.name]
        return older[-1] if older else None

    def prune(self, keep: int, *, eval_losses: Mapping[int, float] | None = None) -> None:
        """Remove all but the ``keep`` newest copies and, given ``eval_losses`` by step, the best; and what killed runs left
        half written or half removed. No save may be under way."""
        steps = self.steps()
        rated = [step for step in steps if step in (eval_losses or {})]
        kept = {*steps[max(0, len(steps) - keep) :], *([min(rated, key=eval_losses.get)] if rated else [])}
        for step in set(steps) - kept:
            path = self.path_of(step)
            # Under its name it must be whole to the last: a kill in the middle of the removal would leave a torso.
            os.rename(path, path.with_name(path.name + ".old"))
        for entry in self.path.iterdir() if self.path.is_dir() else []:
            if _PART.fullmatch(entry.name) and not (entry == beside(self.commits) and not self.commits.exists()):
                _remove(entry)

    def drop_commits(self) -> None:
        """Remove the commits, with the SSD files that they speak of."""
        for path in (beside(self.commits), self.commits):
            discard_commits(path)


def _remove(entry: Path) -> None:
    if entry.name in ("commits.old", "commits.removed"):
        discard_commits(entry, but=files_of(entry.with_name("commits")))
    elif entry.is_dir():
        rmtree(entry, ignore_errors=True)
    else:
        entry.unlink()


def find_state(path: Path, field: str) -> Path:
    """The state that is meant by a run's directory, its ``state/``, or the state itself."""
    if (path / _COMPLETE).is_file() or _NAME.fullmatch(path.name):
        return path
    for directory in (path / "state", path):
        newest = StateDirectory(directory).newest()
        if newest is not None:
            return newest
    what = "holds no complete state" if path.is_dir() else "is not a directory"
    raise RatelError(what, field=field, value=path,
                     remedy="Give the --out of a run, or a state in it; `ratel train --save-every N` writes states")
