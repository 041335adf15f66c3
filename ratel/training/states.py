"""OUT/state: one directory per saved step, and the records of commits. A run resumes from the
newest; any is enough to export from."""

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ratel.errors import RatelError
from ratel.ownership.regular import is_plain
from ratel.runtime.states.commits import Folders, committed_files, discard_commits, discard_partial, files_of
from ratel.runtime.states.durable_files import beside, is_state, remove_state, settled
from ratel.runtime.states.format import is_state_file, read_commit
from ratel.runtime.states.saved_state import SavedState

_NAME = re.compile(r"step-(\d{8,})")
_PART = re.compile(r"(step-\d{8,}|commits)\.(old(?:-\d+)?|partial|removed)")
_PLANES = re.compile(r"step-\d{8,}\.partial\.planes\.0")
"""What becomes the planes of a copy: it has its place in the directory of the copy only when it is
complete."""
_COMPLETE = "manifest.json"


class StateDirectory:
    """A state counts once its directory has its name: until then the name is another, afterwards it
    is whole."""

    def __init__(self, path: Path, folders: Folders = ()) -> None:
        """``folders``: the SSD directories of the run, where its files may be now."""
        self.path, self.folders = path, folders
        self.commits = path / "commits"

    def steps(self) -> list[int]:
        """The steps after which there is a complete state, ascending."""
        if not self.path.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match and self._is_complete(match[0]))

    def _is_complete(self, name: str) -> bool:
        """It had its manifest when it got its name. One that has lost it since is damaged, and not
        passed over."""
        return (self.path / name / _COMPLETE).is_file() or is_state(self.path / name)

    def path_of(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def newest(self) -> Path | None:
        steps = self.steps()
        copy = self.path_of(steps[-1]) if steps else None
        committed = self.committed_step()
        return copy if committed is None or (steps and steps[-1] > committed) else self.commits

    def committed_step(self) -> int | None:
        """The step of the newest commit; one after all others if it cannot be read, so that it is
        not passed over and the reader says why."""
        if not (settled(self.commits) / _COMPLETE).is_file():
            return None
        with suppress(RatelError, KeyError):
            return read_commit(settled(self.commits)).training["extra"]["step"]
        return sys.maxsize

    def before(self, state: Path) -> Path | None:
        """The newest copy that is older than this state, and whole as far as its small files
        tell."""
        older = [path for path in map(self.path_of, self.steps()) if state == self.commits or path.name < state.name]
        return next(filter(_looks_whole, reversed(older)), None)

    def prune(self, keep: int, *, eval_losses: Mapping[int, float] | None = None) -> None:
        """Remove all but the ``keep`` newest copies and, given ``eval_losses`` by step, the best;
        and what killed runs left half written or half removed. No save may be under way."""
        steps = [step for step in self.steps() if is_state(self.path_of(step))]
        rated = [step for step in steps if step in (eval_losses or {})]
        kept = {*steps[max(0, len(steps) - keep) :], *([min(rated, key=eval_losses.get)] if rated else [])}
        for step in set(steps) - kept:
            path = self.path_of(step)
            # Under its name it must be whole to the last: a kill in the middle of the removal would
            # leave a torso.
            os.rename(path, path.with_name(path.name + ".old"))
        for entry in self.path.iterdir() if self.path.is_dir() else []:
            if not (entry == beside(self.commits) and not self.commits.exists()):
                self._remove_part(entry)

    def _remove_part(self, entry: Path) -> None:
        part = _PART.fullmatch(entry.name)
        if _PLANES.fullmatch(entry.name) and is_plain(os.lstat(entry)):
            entry.unlink()
        elif part and part[1] == "commits" and part[2] == "partial":
            discard_partial(entry, self.folders)
        elif part and part[1] == "commits":
            discard_commits(entry, but=files_of(self.commits, self.folders), folders=self.folders)
        elif part:
            remove_state(entry, self.path / part[1])

    def drop_commits(self) -> None:
        """Remove the commits, with the SSD files that are theirs."""
        for path in (beside(self.commits), self.commits):
            discard_commits(path, folders=self.folders)

    def drop_all(self) -> None:
        """Remove every state, and what killed runs left of them. What is somebody else's stays, in
        the directories that it is in."""
        self.drop_commits()
        self.prune(0)
        for name in self.held():
            remove_state(self.path / name)
        with suppress(OSError):  # something else is in it, or it is a link
            os.rmdir(self.path)

    def ssd_files(self) -> list[str]:
        """Those of the commits here that are this directory's own."""
        return sorted(committed_files(self.commits, self.folders))

    def held(self) -> list[str]:
        """States, whole or damaged or in part, by the names of their directories."""
        if not self.path.is_dir():
            return []
        return sorted(name for name in os.listdir(self.path) if self._is_place(name) and is_state(self.path / name))

    def in_the_way(self) -> str | None:
        """What has the name of a state and is none; nobody could say whose it is, were a state put
        there."""
        for name in sorted(os.listdir(self.path)) if self.path.is_dir() else []:
            path = self.path / name
            if self._is_place(name) and not is_state(path) and (not path.is_dir() or self._holds_names_of_a_state(path, name)):
                return name
        return None

    def _is_place(self, name: str) -> bool:
        return name == self.commits.name or bool(_NAME.fullmatch(name) or _PART.fullmatch(name))

    def _holds_names_of_a_state(self, path: Path, name: str) -> bool:
        """Where no kill leaves them: a directory in the making, or one being removed, has some of
        them."""
        return not _PART.fullmatch(name) and any(map(is_state_file, os.listdir(path)))


def _looks_whole(state: Path) -> bool:
    try:
        SavedState(state).check_files()
    except RatelError:
        return False
    return True


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
