"""What becomes of engines that nobody closes: in a forked child, in a process that ends, when they
are dropped."""

from __future__ import annotations

import errno
import os
import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nvme_ds import files, native
from nvme_ds.volume import remove_files

if TYPE_CHECKING:
    from nvme_ds.engine import Engine

SLICE_US = 100_000  # how long native code keeps a waiting thread before Python may look at its signals
UNFINISHED = (-errno.EINPROGRESS, native.STALLED)

_EXIT_PATIENCE_S = 5.0

engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _give_to_parent() -> None:
    """Give the engines to the parent, in a forked child, which has none of the threads that would
    answer."""
    for engine in list(engines):
        engine._closed = True


os.register_at_fork(after_in_child=_give_to_parent)


def remove_scratch() -> None:
    """Remove scratch files for a process that is going to end without closing anything: nobody
    would look for these files."""
    for engine in list(engines):
        for made in list(engine.scratch.values()) if not engine.is_foreign else []:
            remove_files(made)


def shut_down(functions, handle: int, process: int, scratch: Mapping[int, list[tuple[str, files.Inode]]]) -> None:
    """End an engine that was dropped without close(), also at interpreter exit; a dead device must
    not keep the process. In a forked child nothing is: threads and files are the parent's."""
    if os.getpid() != process:
        return
    deadline_s = time.monotonic() + _EXIT_PATIENCE_S
    while (status := functions.engine_close(handle, SLICE_US)) in UNFINISHED:
        if status == native.STALLED or time.monotonic() >= deadline_s:
            functions.engine_abandon(handle)
            return
    for made in scratch.values():  # while they are locked: their names are free for others then
        remove_files(made)
    functions.engine_destroy(handle)


def is_stalled(before: int, status: int) -> bool:
    """Silence must show twice in a row: a process that was stopped for minutes finds the answers of
    that time still unread, and its engine's threads need a moment."""
    return before == status == native.STALLED
