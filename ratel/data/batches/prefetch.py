"""Work done ahead in a thread of its own, a bounded number of items, in order."""

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from ratel import interrupt
from ratel.errors import RatelError, WorkerError

_JOIN_S = 2.0
"""Closing waits this long for the item in the making. A thread deep in one huge document is left to
end alone."""

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls ``produce`` again and again in a thread, at most ``depth`` items ahead of ``get``.

    An error of ``produce`` is raised by the ``get`` that would have had its item: a RatelError as
    it is, anything else as the cause of a WorkerError. After ``close``, ``get`` raises
    StopIteration.
    """

    def __init__(self, produce: Callable[[], T], *, depth: int, name: str) -> None:
        self._produce, self._process = produce, os.getpid()
        self._depth = depth
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def get(self) -> T:
        with self._changed:
            while not self._changed.wait_for(lambda: self._ready or self._error or self._closed, interrupt.POLL_S):
                interrupt.check()
            if self._closed:
                raise StopIteration
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            error = self._error
        if isinstance(error, RatelError):
            raise error
        raise WorkerError(f"the thread {self._thread.name} failed: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        if os.getpid() != self._process:
            return  # a forked child has neither the thread nor, perhaps, the lock
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            while self._wait_for_room():
                self._put(self._produce())
        except BaseException as error:  # whatever it is, the caller must not wait for ever
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
            return not self._closed

    def _put(self, item: T) -> None:
        with self._changed:
            if not self._closed:
                self._ready.append(item)
                self._changed.notify_all()
