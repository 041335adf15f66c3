"""Which SSD files belong to a directory of commits: spoken of by its manifest, and stamped with
this very directory. What a copy of it speaks of is the original's: read, never written to, never
removed."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ratel.ownership.stamps import belongs_to, is_empty, is_ssd_file, read_stamp, remove_if_free, volume_of
from ratel.runtime.states.durable_files import is_state, remove_state
from ratel.runtime.states.format import read_manifest

Folders = Sequence["str | os.PathLike[str]"]
_SUFFIXES = ("", ".old", ".removed", ".partial")
"""Suffixes under which a directory of commits may lie: its own, those of one that is replaced or
given up, and of one in the making."""


def located(state: Path, manifest: dict[str, Any], folders: Folders = ()) -> list[Path]:
    """The files with the planes of a state. One that is not where it was when it was written may be
    in ``folders`` by now: drives are mounted elsewhere, directories are renamed."""
    return [_located(state / name, folders) for name in manifest["files"]]


def _located(path: Path, folders: Folders) -> Path:
    if volume_of(path.name) is None or os.path.lexists(path):
        return path
    elsewhere = (Path(os.path.realpath(folder)) / path.name for folder in folders)
    return next((found for found in elsewhere if read_stamp(found) is not None), path)


def files_of(commits: Path, folders: Folders = ()) -> set[str]:
    """The SSD files that a directory of commits speaks of and owns; none where there is no such
    directory."""
    with suppress(ValueError, OSError, KeyError, TypeError):
        manifest = read_manifest(commits)
        if manifest["num_slots"] > 1:
            return {os.fspath(path) for path in located(commits, manifest, folders) if belongs_to(path, commits)}
    return set()


def committed_files(commits: Path, folders: Folders = ()) -> set[str]:
    """The files of the directory's commits, and of those directories beside it that a killed run
    has not done with."""
    return set().union(*(files_of(commits.with_name(commits.name + suffix), folders) for suffix in _SUFFIXES))


def remove_leftovers(commits: Path | None, directories: Iterable[str]) -> None:
    """Remove what killed runs have left on the SSDs: files that no commit was ever to speak of,
    those that the first commit to this directory would have spoken of, and those that hold nothing
    yet. Whatever else is there, and what is in use, stays."""
    unborn = None if commits is None else commits.with_name(commits.name + ".partial")
    for folder in {os.path.realpath(directory) for directory in directories}:
        for entry in list(os.scandir(folder)) if os.path.isdir(folder) else []:
            if is_ssd_file(entry.name) and _is_left_over(entry.path, unborn):
                with suppress(OSError):
                    remove_if_free(entry.path)


def _is_left_over(path: str, unborn: Path | None) -> bool:
    stamp = read_stamp(path)
    if stamp is None:
        return is_empty(path)
    return not stamp.owner or (unborn is not None and belongs_to(path, unborn))


def discard_partial(partial: Path, folders: Folders) -> None:
    """What a run leaves that was killed in its first commit."""
    for path in files_of(partial, folders):
        remove_if_free(path)
    remove_state(partial)


def discard_commits(commits: Path, *, but: Iterable[str] = (), folders: Folders = ()) -> None:
    """Remove a directory of commits with the SSD files that it owns, except ``but``. What somebody
    else put into it stays.

    It loses its name first: a kill in the middle must not leave records of files that are gone.
    """
    name = commits.with_name(commits.name.removesuffix(".old").removesuffix(".removed"))
    given_up = name.with_name(name.name + ".removed")
    _clear(given_up, name, but, folders)
    if commits != given_up and is_state(commits):
        os.rename(commits, given_up)
        _clear(given_up, name, but, folders)


def _clear(given_up: Path, name: Path, but: Iterable[str], folders: Folders) -> None:
    for path in files_of(given_up, folders) - set(but):
        remove_if_free(path)
    remove_state(given_up, name)
