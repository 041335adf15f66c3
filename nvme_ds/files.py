"""The files of a volume: made at full size, locked, and opened past the page cache where the file
system can.

Directories may be shared with others. No link is followed, and a file counts only if it is regular
and has one name: what is written to it changes nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from nvme_ds.errors import NoSpaceError

logger = logging.getLogger("nvme_ds")
ALIGNMENT = 4096


def volume_paths(directories: Sequence[str], name: str) -> list[str]:
    return [os.path.join(directory, f"{name}.{index}") for index, directory in enumerate(directories)]


Inode = tuple[int, int, int]
"""What tells a file from every other, and whether it was cut short: device, number and size."""


def inode_of(found: os.stat_result) -> Inode:
    return found.st_dev, found.st_ino, found.st_size


MayReplace = Callable[[int], bool]
"""Whether a file of a wanted name may go; it is asked with the file's descriptor."""


def create_files(paths: Sequence[str], sizes: Sequence[int], tails: Sequence[bytes], may_replace: MayReplace,
                 undo: ExitStack) -> list[int]:
    """Descriptors of new files, fully allocated. ``tails``: their last bytes. ``undo`` closes and
    removes them."""
    return [_create(path, num_bytes, tail, may_replace, undo) for path, num_bytes, tail in zip(paths, sizes, tails)]


def open_files(paths: Sequence[str], sizes: Sequence[int], undo: ExitStack) -> list[int]:
    """Descriptors of the files, which ``undo`` closes."""
    return [_open(path, num_bytes, undo) for path, num_bytes in zip(paths, sizes)]


def _create(path: str, num_bytes: int, tail: bytes, may_replace: MayReplace, undo: ExitStack) -> int:
    _remove_older(path, may_replace)
    fd = _open_locked(path, os.O_CREAT | os.O_EXCL, undo)
    undo.callback(os.unlink, path)
    if tail:
        # Before it takes space: whatever is found in its place after a kill or a power failure
        # holds nothing, or says what it is.
        os.ftruncate(fd, num_bytes)
        os.pwrite(fd, tail, num_bytes - len(tail))
        os.fsync(fd)
    _allocate(fd, path, num_bytes)
    return fd


def _remove_older(path: str, may_replace: MayReplace) -> None:
    with ExitStack() as done:
        try:
            fd = _open_locked(path, 0, done)
        except FileNotFoundError:
            return
        if not _holds_nothing(os.fstat(fd)) and not may_replace(fd):
            raise OSError(errno.EEXIST, "a file of that name is there, which is somebody else's", path)
        os.unlink(path)


def _holds_nothing(found: os.stat_result) -> bool:
    """Whether not a byte was ever written to a file. (A small file may be kept where a file system
    has its names, and take no blocks.)"""
    return found.st_size == 0 or (found.st_blocks == 0 and found.st_size >= ALIGNMENT)


def _open(path: str, num_bytes: int, undo: ExitStack) -> int:
    fd = _open_locked(path, 0, undo)
    found = os.fstat(fd).st_size
    if found != num_bytes:
        message = f"the file has {found} bytes, this layout needs {num_bytes}: it was made with another one"
        raise OSError(errno.EINVAL, message, path)
    return fd


def _open_locked(path: str, flags: int, undo: ExitStack) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a link has the name of a file that is to be written", path) from error
        raise
    undo.callback(os.close, fd)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        raise OSError(errno.EEXIST, "what has the name of a file that is to be written is not a regular file with one name",
                      path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Two runs on the same files would destroy each other's state without any error.
        raise OSError(errno.EBUSY, "the file is in use by another volume or process", path) from error
    if os.fstat(fd).st_nlink == 0:  # between its making and its lock it was taken for one that a killed process has left
        raise OSError(errno.EBUSY, "another process has just removed the file", path)
    return fd


def _allocate(fd: int, path: str, num_bytes: int) -> None:
    if num_bytes == 0:
        return
    directory = os.path.dirname(path)
    stat = os.fstatvfs(fd)
    free_bytes = stat.f_bavail * stat.f_frsize
    # Asked first: an allocation that cannot succeed may fill the disk for everybody else before it
    # fails.
    if num_bytes > free_bytes:
        raise NoSpaceError(errno.ENOSPC, directory, needed_bytes=num_bytes, free_bytes=free_bytes)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpaceError(error.errno, directory, needed_bytes=num_bytes, free_bytes=free_bytes) from error
        raise OSError(error.errno, error.strerror, path) from error


def bypass_page_cache(fds: Sequence[int], paths: Sequence[str], mode: str, *, refuse: bool = False) -> bool:
    """Turn on O_DIRECT for all files or none. ``mode`` is auto, on or off; ``refuse`` acts as a
    file system without it."""
    if mode == "off":
        return False
    for fd, path in zip(fds, paths):
        reason = "refused for a test" if refuse else _direct_refusal(fd)
        if reason is None:
            continue
        if mode == "on":
            message = f"no O_DIRECT on this file system ({reason}): use direct='auto' or another directory"
            raise OSError(errno.EINVAL, message, path)
        say_buffered(path, reason)
        for other in fds:
            _set_direct(other, False)
        return False
    return True


def say_buffered(path: str, reason: str) -> None:
    logger.warning("%s: no O_DIRECT (%s); using the page cache, slower and at the cost of DRAM", path, reason)


def _set_direct(fd: int, on: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)


def _direct_refusal(fd: int) -> str | None:
    """Why O_DIRECT does not work here; some file systems take the flag and then refuse the
    transfer."""
    try:
        _set_direct(fd, True)
        if os.fstat(fd).st_size >= ALIGNMENT:
            with mmap.mmap(-1, ALIGNMENT) as page:
                os.preadv(fd, [page], 0)
    except OSError as error:
        return error.strerror
    return None
