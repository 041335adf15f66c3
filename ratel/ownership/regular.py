"""Opening what may be anything: no link is followed, nothing but a regular file with one name is
read, nothing blocks."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened(path: "str | os.PathLike[str]", flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor. OSError for what is not there, a link, not a regular file, or a file with
    further names."""
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not is_plain(os.fstat(descriptor)):
            raise OSError("is not a regular file with one name")
        yield descriptor
    finally:
        os.close(descriptor)


def is_plain(found: os.stat_result) -> bool:
    """A regular file that has one name: what happens to it happens to nothing else."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def begins_with(path: Path, *texts: bytes) -> bool:
    """Whether it is such a file with one of these beginnings."""
    try:
        with opened(path) as descriptor:
            return os.pread(descriptor, max(map(len, texts)), 0).startswith(texts)
    except OSError:
        return False
