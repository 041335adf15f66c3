"""Files and directories that are there, whole, after a power failure."""

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ratel.errors import RatelError


def write_synced(path: Path, content: bytes) -> None:
    """In place, without cutting the file first: a file of the same length needs no new blocks."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def make_directory(path: Path) -> None:
    """With its parents; each new name is on disk before anything is put under it."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_path(path.parent)


def existing_part(path: Path) -> Path:
    """The path itself, or the nearest directory above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if os.path.exists(p))


def sync_path(path: Path) -> None:
    """What a file holds, or which names a directory has, is on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replaceable(path: Path, field: str) -> Path:
    """Where a directory of that name goes, links followed. Raises RatelError for what no other can take the name of."""
    if path.exists() and not path.is_dir():
        raise RatelError("is a file", field=field, value=path, remedy="Give a directory")
    if path.name in ("", "..") or os.path.ismount(path):
        raise RatelError("another directory cannot take its place, as a complete one does", field=field, value=path,
                         remedy="Give a directory in it")
    return path.resolve() if path.is_symlink() else path


def replace_directory(partial: Path, path: Path, discard: Callable[[Path], object] = shutil.rmtree, *,
                      old: Path | None = None) -> None:
    """Put a complete directory under its name; an older one waits as ``old`` and is given to ``discard`` only then."""
    old = beside(path) if old is None else old
    if path.exists():
        if old.exists():
            discard(old)
        os.rename(path, old)
    os.rename(partial, path)
    sync_path(path.parent)
    if old.exists():
        discard(old)


def discard_all_but(is_others: Callable[[str], bool], old: Path, into: Path) -> None:
    """Remove a directory that was replaced by ``into``. What somebody else put into it moves over."""
    move_others(is_others, old, into)
    shutil.rmtree(old)


def move_others(is_others: Callable[[str], bool], old: Path, into: Path) -> None:
    for entry in list(old.iterdir()):
        if is_others(entry.name) and not os.path.lexists(into / entry.name):
            os.rename(entry, into / entry.name)
    sync_path(into)


def beside(path: Path) -> Path:
    """Where a directory that is being replaced waits."""
    return path.with_name(path.name + ".old")


def settled(path: Path) -> Path:
    """Where the directory is. A kill between the two renames of a replacement has left the older one beside its name."""
    return path if path.exists() or not beside(path).exists() else beside(path)


def remove_files(paths: Iterable[str]) -> None:
    for path in paths:
        with suppress(FileNotFoundError):
            os.unlink(path)
