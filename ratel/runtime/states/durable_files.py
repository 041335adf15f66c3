"""Files and directories that are there, whole, after a power failure."""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

from ratel.errors import RatelError
from ratel.ownership.regular import begins_with
from ratel.runtime.states.format import STATE_BEGINNINGS, is_state_file
from ratel.synced import sync_path


def make_directory(path: Path) -> None:
    """Make a directory with its parents; each new name is on disk before anything is put under
    it."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_path(path.parent)


def existing_part(path: Path) -> Path:
    """The path itself, or the nearest directory above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if os.path.exists(p))


def replaceable(path: Path, field: str) -> Path:
    """Where a directory of that name goes, links followed. Raises RatelError for what no other can
    take the name of."""
    if path.exists() and not path.is_dir():
        raise RatelError("is a file", field=field, value=path, remedy="Give a directory")
    if path.name in ("", "..") or os.path.ismount(path):
        raise RatelError("another directory cannot take its place, as a complete one does", field=field, value=path,
                         remedy="Give a directory in it")
    return path.resolve() if path.is_symlink() else path


def replace_directory(partial: Path, path: Path, discard: Callable[[Path], object], *, suffix: str = ".old") -> None:
    """Put a complete directory under its name; an older one waits beside it and is given to
    ``discard`` only then. Whatever else has the name that it would wait under stays."""
    old = None
    if path.exists():
        names = chain((f"{path.name}{suffix}",), (f"{path.name}{suffix}-{number}" for number in count(2)))
        old = _first_free(path, names)
        os.rename(path, old)
    os.rename(partial, path)
    sync_path(path.parent)
    if old is not None:
        discard(old)


def move_others(others: Iterable[str], old: Path, into: Path) -> None:
    """What somebody else put into a directory goes with its name, under another where ``into`` has
    such a file."""
    for name in others:
        os.rename(old / name, _free_name(into / name))
    sync_path(into)


def _free_name(path: Path) -> Path:
    before = f"{path.name}.before"
    return _first_free(path, chain((path.name, before), (f"{before}-{number}" for number in count(2))))


def _first_free(path: Path, names: Iterable[str]) -> Path:
    return next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))


def beside(path: Path) -> Path:
    """Where a directory that is being replaced waits."""
    return path.with_name(path.name + ".old")


def settled(path: Path) -> Path:
    """Where the directory is. A kill between the two renames of a replacement has left the older
    one beside its name."""
    return path if path.exists() or not beside(path).exists() else beside(path)


def remove_files(paths: Iterable[str]) -> None:
    for path in paths:
        with suppress(FileNotFoundError):
            os.unlink(path)


# --- directories with a state -------------------------------------------------------------------------------------

def others_in(state: Path) -> list[str]:
    return [entry.name for entry in os.scandir(state) if not is_state_file(entry.name)]


def is_state(path: Path) -> bool:
    """Whether a directory holds a state, be it damaged: known by how its files begin."""
    return any(begins_with(path / name, beginning) for name, beginning in STATE_BEGINNINGS.items())


def remove_state(state: Path, name: Path | None = None) -> None:
    """Remove a directory with a state. Where it holds something else that stays, in a directory
    called ``name``."""
    if not state.is_dir() or state.is_symlink() or not (is_state(state) or _is_part(state)):
        return
    for name_there in filter(is_state_file, os.listdir(state)):
        with suppress(IsADirectoryError, PermissionError):
            os.unlink(state / name_there)
    try:
        os.rmdir(state)
    except OSError:
        if name is not None and not os.path.lexists(name):
            os.rename(state, name)


def _is_part(state: Path) -> bool:
    """What a kill may have left: in the making, or being removed. There is nothing else in it."""
    return _PART.fullmatch(state.name) is not None and all(map(is_state_file, os.listdir(state)))


_PART = re.compile(r".+\.(partial|removed|old(-\d+)?)")


def check_state_target(path: Path, field: str, *beside: str) -> None:
    """Refuse a directory whose files of a state's names are somebody else's; and those beside it,
    with these suffixes, that would go with it."""
    for there in (path, *(path.with_name(path.name + suffix) for suffix in (".partial", *beside))):
        if not os.path.lexists(there):
            continue
        if not there.is_dir():
            raise RatelError("is not a directory", field=field, value=there, remedy=_MOVE_IT)
        names = os.listdir(there)
        wrong = next((name for name in names if is_state_file(name) == (there == path)), None)
        if wrong is not None and not is_state(there):
            raise RatelError(f"holds {wrong}, which is not of a training state", field=field, value=there, remedy=_MOVE_IT)


_MOVE_IT = "Move it away, or give another directory"
