"""OUT/state: one directory per saved step. A run resumes from the newest one; any is enough to export from."""

import os
import re
from pathlib import Path
from shutil import rmtree

from ratel.errors import RatelError

_NAME = re.compile(r"step-(\d{8,})")
_COMPLETE = "manifest.json"


class StateDirectory:
    """A state counts once its directory has its name: until then the name is another, afterwards it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

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
        return self.path_of(steps[-1]) if steps else None

    def before(self, state: Path) -> Path | None:
        """The newest state that is older than this one."""
        older = [path for path in map(self.path_of, self.steps()) if path.name < state.name]
        return older[-1] if older else None

    def prune(self, keep: int) -> None:
        """Remove all but the ``keep`` newest states, and what killed runs left half written or half removed."""
        for step in self.steps()[:-keep]:
            path = self.path_of(step)
            # Under its name it must be whole to the last: a kill in the middle of the removal would leave a torso.
            os.rename(path, path.with_name(path.name + ".old"))
        for entry in self.path.iterdir():
            if entry.suffix in (".old", ".partial") and _NAME.fullmatch(entry.stem):
                rmtree(entry, ignore_errors=True)


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
