"""Files and names that are on the disk when a function returns: a power failure later changes
nothing about them."""

import os
from pathlib import Path


def sync_path(path: "str | os.PathLike[str]") -> None:
    """What a file holds, or which names a directory has, is on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: "str | os.PathLike[str]") -> None:
    """What a file holds, and its name."""
    sync_path(path)
    sync_path(os.path.dirname(os.path.abspath(path)))


def sync_tree(directory: Path) -> None:
    """Everything in it; its own name is its parent's."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(folder, name)):
                sync_path(os.path.join(folder, name))
        sync_path(folder)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file in place, without cutting it first: a file of the same length needs no new
    blocks. Links are not followed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def partial_name(name: str) -> str:
    """The name of a file until it is complete and has its own."""
    return f".{name}.ratel-partial"


def replace_synced(path: Path, content: bytes) -> None:
    """A file of that name is replaced as a whole: a reader, and a power failure, finds the old one
    or the new one."""
    partial = path.with_name(partial_name(path.name))
    partial.unlink(missing_ok=True)
    write_synced(partial, content)
    os.replace(partial, path)
    sync_path(path.parent)
