"""Memory for the arena that is mapped from the moment a command starts, before anything is known
but about how much it will be.

The kernel clears memory at 4 to 5 GB/s, so 30 GiB take longer than reading the checkpoint of the
model that needs them; while Python imports its modules on one core, the others have nothing to do.
The arena takes what is mapped, gives back what is too much and maps what is missing. Pinned it can
be as a whole only, so that is done ahead where its size is known from an earlier start, and undone
if it has become another. A plan must see the machine as if nothing were held here: see ``paused``.
"""

import atexit
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ratel import native
from ratel.memory.anonymous import MOST_PINNED_BYTES, TOUCHED_BYTES, Taken, anonymous_map, arena_in, touch
from ratel.startup import context_ahead
from ratel.trace import phases
from ratel.units import align_up

_current: "_Early | None" = None


class _Early:
    def __init__(self, num_bytes: int, threads: int, pins: bool) -> None:
        self.map = anonymous_map(align_up(num_bytes, mmap.PAGESIZE))
        self.touched_bytes = 0
        self.is_pinned, self._pins = False, pins and num_bytes <= MOST_PINNED_BYTES  # more is pinned in pieces, which an arena's layout gives
        self.lock = threading.Lock()
        """Held while a piece is being mapped, and by whoever wants it quiet."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(threads,), name="ratel-arena", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _work(self, threads: int) -> None:
        begin_s = phases.age_s()
        with native.op_ds.Pool(threads) as pool:
            while self.touched_bytes < len(self.map):
                with self.lock:
                    if self._ended.is_set():
                        break
                    count = min(TOUCHED_BYTES, len(self.map) - self.touched_bytes)
                    touch(pool, self.map, self.touched_bytes, count)
                    self.touched_bytes += count
        phases.note("mapping memory ahead", begin_s, bytes=self.touched_bytes)
        if self._pins and not self._ended.is_set():
            begin_s = phases.age_s()
            self.is_pinned = context_ahead.pin(*arena_in(self.map))
            phases.note("pinning memory ahead", begin_s, bytes=len(self.map) if self.is_pinned else 0)

    def unpin(self) -> None:
        if self.is_pinned:
            context_ahead.unpin(arena_in(self.map)[0])
            self.is_pinned = False


def begin(num_bytes: int, threads: int, *, pins: bool = False) -> None:
    """Map up to so much, in the background. Where the system has not that much to give, nothing is
    done. ``pins``: it is just what an arena is going to take, and is to be pinned for the GPU,
    too."""
    global _current
    drop()
    if num_bytes <= 0:
        return
    with suppress(ValueError, OSError):
        _current = _Early(num_bytes, threads, pins)
        # Before the interpreter takes the map away under the threads that write to it.
        atexit.register(drop)


@contextmanager
def paused() -> Iterator[int]:
    """Bytes of the process's memory that are held here, and stay as many in the block."""
    if _current is None:
        yield 0
        return
    with _current.lock:
        yield _current.touched_bytes


@contextmanager
def put_aside() -> Iterator[None]:
    """Hide the memory that is mapped ahead from sessions beside the one that it is for."""
    global _current
    held, _current = _current, None
    try:
        yield
    finally:
        _current = held


def take(num_bytes: int) -> Taken | None:
    """The memory as a map of this size; None where there is none."""
    global _current
    begun, _current = _current, None
    if begun is None:
        return None
    begun.end()
    size = align_up(num_bytes, mmap.PAGESIZE)
    if size == len(begun.map):
        return Taken(map=begun.map, is_pinned=begun.is_pinned)
    begun.unpin()
    try:
        begun.map.resize(size)
    except (OSError, ValueError, SystemError):
        begun.map.close()
        return None
    return Taken(map=begun.map)


def drop() -> None:
    """Give everything back. What is being pinned, which keeps others from the driver, is waited
    for."""
    global _current
    begun, _current = _current, None
    if begun is not None:
        begun.end()
        begun.unpin()
        begun.map.close()
