"""Which SSD files belong to a run that commits in place: found by its records, named so that none is overwritten, and
removed when nothing speaks of them any more."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ratel.runtime.durable_files import beside, remove_files
from ratel.runtime.state_format import read_manifest


def files_of(commits: Path) -> set[str]:
    """The SSD files that a directory of commits speaks of; none where there is no such directory."""
    with suppress(ValueError, OSError):
        manifest = read_manifest(commits)
        if manifest["num_slots"] > 1:
            return {os.fspath(commits / name) for name in manifest["files"]}
    return set()


def committed_files(commits: Path) -> set[str]:
    """Of the directory, and of those beside it that a killed run has not done with."""
    return files_of(commits) | files_of(beside(commits)) | files_of(_given_up(commits))


def volume_name(commits: Path) -> str:
    """Of a run that commits to this directory, and other than what lies there: a state that is resumed elsewhere is read
    while its successor is written."""
    taken = {Path(path).name.rpartition(".")[0] for path in committed_files(commits)}
    return next(name for name in _names(commits) if name not in taken)


def remove_leftovers(commits: Path, directories: Iterable[str]) -> None:
    """Remove volumes of this run that no commit speaks of: a start of it was killed before its first one."""
    spoken_of = committed_files(commits)
    for folder in map(os.path.realpath, directories):
        for entry in os.scandir(folder):
            if entry.name.rpartition(".")[0] in _names(commits) and entry.path not in spoken_of:
                _remove_unless_in_use(entry.path)


def discard_commits(commits: Path, *, but: Iterable[str] = ()) -> None:
    """Remove a directory of commits with the SSD files that it speaks of, except ``but``.

    It loses its name first: a kill in the middle must not leave records of files that are gone.
    """
    given_up = _given_up(commits.with_name(commits.name.removesuffix(".old").removesuffix(".removed")))
    _clear(given_up, but)
    if commits != given_up and commits.exists():
        os.rename(commits, given_up)
        _clear(given_up, but)


def _clear(given_up: Path, but: Iterable[str]) -> None:
    remove_files(files_of(given_up) - set(but))
    shutil.rmtree(given_up, ignore_errors=True)


def _given_up(commits: Path) -> Path:
    return commits.with_name(commits.name + ".removed")


def _names(commits: Path) -> list[str]:
    """One more than `committed_files` can speak of."""
    own = f"ratel-{hashlib.sha256(os.path.realpath(commits).encode()).hexdigest()[:12]}"
    return [f"{own}-{letter}" for letter in "abcd"]


def _remove_unless_in_use(path: str) -> None:
    with suppress(FileNotFoundError), open(path, "rb") as file:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
