"""The door of a session: one thread at a time, only in the process that made it, and signals wait
inside."""

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ratel import interrupt
from ratel.errors import RatelError
from ratel.models.structure.dispatch_modes import modes_as_before

Method = TypeVar("Method", bound=Callable[..., Any])


class Entrance:
    def __init__(self) -> None:
        self._process = os.getpid()
        self._call = ""
        """The outermost one that is under way."""
        self._inside: dict[str, int] = {}
        """The thread that is, if one is. `dict.setdefault` is one operation: no signal comes into
        it, and no other thread."""

    @property
    def is_foreign(self) -> bool:
        """Whether this process is a child that was forked from the session's: it has none of its
        threads."""
        return os.getpid() != self._process

    @contextmanager
    def passed(self, call: str) -> Iterator[None]:
        if self.is_foreign:
            raise RatelError("belongs to the process that this one was forked from, with its threads and files",
                             field="session", remedy="Use it there, or make a session of this process's own after the fork")
        me = threading.get_ident()
        if self._inside.get("thread") == me and not self._is_under_way():
            self._inside.clear()
        if self._inside.get("thread") == me:
            self._check_within(call)
            yield
            return
        with interrupt.deferring(), modes_as_before():  # from here on no signal comes before the end is noted
            if self._inside.setdefault("thread", me) != me:
                raise RatelError("another thread is in a call of this session", field="session",
                                 remedy="Call it from one thread at a time")
            try:
                self._call = call
                yield
            finally:
                self._inside.clear()

    def _is_under_way(self) -> bool:
        """Whether this thread really is in a call, besides the one that asks. What a debugger
        raises at the very end of one leaves it noted."""
        frame, calls = sys._getframe(), 0
        while frame is not None:
            calls += frame.f_code is _CALL and frame.f_locals["self"]._entrance is self
            frame = frame.f_back
        return calls > 1

    def _check_within(self, call: str) -> None:
        """Methods call each other; and a step or an evaluation calls code of the user's: hooks, a
        loss, an iterator of batches. What that asks for would meet a step that is half done."""
        if call not in _CALLED_WITHIN or self._call in _CALLING_USERS:
            raise RatelError(f"is called inside {self._call}, by a hook or an iterator of batches",
                             field=call.lstrip("_"), remedy=f"Call it before or after {self._call}")


_CALLED_WITHIN = ("flush", "wait_saved", "read_master", "read_state")
_CALLING_USERS = ("step", "evaluate", "prepare", "plan_for")


def entered(method: Method) -> Method:
    """A method of a class with an ``_entrance``."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        with self._entrance.passed(method.__name__):
            return method(self, *args, **options)

    return call


_CALL = entered(lambda self: None).__code__
