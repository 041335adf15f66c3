"""The errors that the engine raises."""

from __future__ import annotations

import errno as errno_module
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvme_ds.native import Failure

OPS = ("read", "write", "sync")


class BuildError(RuntimeError):
    """The native library cannot be compiled here; the message names what to install."""


class IoError(OSError):
    """A transfer failed. ``errno`` and ``filename`` as in OSError; ``offset`` and ``num_bytes`` are
    the range of that file that did not make it; ``op`` is ``"read"``, ``"write"`` or ``"sync"``."""

    def __init__(self, errno: int, path: str, *, op: str, offset: int, num_bytes: int) -> None:
        where = f"{op} of {num_bytes} bytes at offset {offset}" if num_bytes else op
        reason = "the device does not answer" if errno == errno_module.ETIMEDOUT else os.strerror(errno)
        super().__init__(errno, f"{where} failed: {reason}", path)
        self.op, self.offset, self.num_bytes = op, offset, num_bytes


class DirectError(IoError):
    """The file system has taken O_DIRECT and refuses a transfer with it, where nothing else is
    allowed."""

    def __init__(self, errno: int, path: str, *, op: str, offset: int, num_bytes: int) -> None:
        super().__init__(errno, path, op=op, offset=offset, num_bytes=num_bytes)
        self.strerror += "; this file system takes O_DIRECT and then refuses it: use direct='auto'"


class StallError(IoError):
    """A device has requests and has answered none of them for ``stall_timeout_s``; ``filename`` is
    a file on it.

    ``errno`` is ETIMEDOUT. The transfer goes on, and so does the kernel's use of its memory: wait
    again, or close the engine and give it up.
    """


class NoSpaceError(OSError):
    """A directory cannot hold its share of a volume. Raised when the volume is created, before
    anything is written."""

    def __init__(self, errno: int, directory: str, *, needed_bytes: int, free_bytes: int) -> None:
        if errno == errno_module.EFBIG:
            text = f"a file of {needed_bytes} bytes is more than the file system, or the limit of this process (ulimit -f), takes"
        else:
            text = f"{needed_bytes} bytes are needed and {free_bytes} are free. Free some space or give another directory"
        super().__init__(errno, text, directory)
        self.directory, self.needed_bytes, self.free_bytes = directory, needed_bytes, free_bytes


def transfer_error(failure: Failure, *, is_stalled: bool, is_direct: bool) -> IoError:
    """What native code reports of a transfer; ``is_direct``: of a file that bypasses the page
    cache."""
    refused = is_direct and failure.error in (errno_module.EINVAL, errno_module.EOPNOTSUPP)
    kind = DirectError if refused else StallError if is_stalled else IoError
    return kind(failure.error, os.fsdecode(failure.path), op=OPS[failure.op], offset=failure.offset, num_bytes=failure.num_bytes)


def canceled() -> IoError:
    return IoError(errno_module.ECANCELED, "", op="wait", offset=0, num_bytes=0)


def checked(status: int, what: str) -> int:
    if status < 0:
        raise OSError(-status, f"{what}: {os.strerror(-status)}")
    return status
