"""Ctrl-C, SIGTERM and SIGHUP without an exception between two lines of our own book-keeping.

A handler counts and returns. Code looks where it can end: every wait of the main thread, every
piece of work of a start and an end calls ``check``, which raises once a request is due. The first
one is due at once, and in a block of ``finishing`` the second is, since the first lets the work
there come to its own end. Who asks once more than that is not made to wait for a place: in somebody
else's program the signal does then what it did before, and a command ends
(``ratel/cli/process.py``).
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

POLL_S = 0.1
"""Seconds between two looks of the main thread at what it waits for."""
TWICE_S = 1.0
"""`timeout`, service managers and a terminal that closes tell a process and its group, that is the
process twice: what comes within so long is one request. Not of SIGINT: people press keys twice."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_current: "Watch | None" = None

Answer = Callable[["Watch", int, "FrameType | None"], None]
"""Is given the signal, and in a handler the frame that it came into."""


class Interrupted(KeyboardInterrupt):
    """A run that was told to stop. What it completed is written; ``result`` says how far it got."""

    def __init__(self, message: str = "interrupted", result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class Count:
    """A count of requests; a signal may be the echo of one."""

    def __init__(self) -> None:
        self.number, self.last, self._at_s = 0, int(signal.SIGINT), -TWICE_S

    def add(self, number: int) -> bool:
        now_s = time.monotonic()
        if number not in SIGNALS or (number != signal.SIGINT and now_s - self._at_s < TWICE_S):
            return False
        self.number, self.last, self._at_s = self.number + 1, number, now_s
        return True


class Watch:
    """Handlers of the main thread from ``begin`` to ``end``; one at a time counts, others inside it
    do nothing."""

    def __init__(self, numbers: tuple[int, ...], *, answer: "Answer", insist: "Answer") -> None:
        """``answer`` is called where a request is due and everything in order, ``insist`` where
        nobody can be made to wait."""
        self._numbers, self._answer, self._insist = numbers, answer, insist
        self.count, self._answered = Count(), 0
        self.is_finishing = self.is_outside = False
        self._previous: dict[int, Any] = {}

    def begin(self) -> None:
        global _current
        if _current is not None or threading.current_thread() is not threading.main_thread():
            return  # only the main thread may install handlers; what runs in another is stopped by whoever owns it
        _current = self
        try:
            for number in self._numbers:
                self._previous[number] = signal.getsignal(number)
                signal.signal(number, self._on_signal)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Put back what was there. A request that nobody has answered is made again, of whoever is
        there now."""
        global _current
        if _current is not self:
            return
        for number, handler in self._previous.items():
            if handler is not None:  # one that was not installed from Python
                signal.signal(number, handler)
        _current = None
        if self.requests > self._answered:
            signal.raise_signal(self.count.last)

    @property
    def requests(self) -> int:
        return self.count.number

    @property
    def is_due(self) -> bool:
        return self.requests >= self._answered + self._patience

    @property
    def _patience(self) -> int:
        return 2 if self.is_finishing else 1

    def requests_left(self) -> int:
        """How many more it takes until nobody is made to wait."""
        return self._answered + self._patience + 1 - self.requests

    def answer(self) -> None:
        self._answered = self.requests
        self._answer(self, self.count.last, None)

    def settle(self) -> None:
        """Note that what was asked for is done."""
        self._answered = self.requests

    def previous(self, number: int) -> Any:
        return self._previous[number]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.count.add(number):
            return
        if self.is_finishing and not self.is_due:
            say("\nStopping after this step (once more: stop at once, without writing the model)\n")
        if self.requests_left() <= 0 or (self.is_outside and self.is_due):
            self._answered = self.requests
            self._insist(self, number, frame)


def say(text: str) -> None:
    """Print from a handler: print() may be what it has interrupted, and the terminal may be
    gone."""
    with suppress(OSError):
        os.write(2, text.encode())


def check() -> None:
    """Raise what a signal asks for, if it is due. A place to call this from is one where everything
    is in order."""
    if _current is not None and _current.is_due and threading.current_thread() is threading.main_thread():
        _current.answer()


def wait_for(event: threading.Event) -> None:
    check()
    while not event.wait(POLL_S):
        check()


def join(thread: threading.Thread) -> None:
    check()
    while thread.is_alive():
        thread.join(POLL_S)
        check()


@contextmanager
def watching() -> Iterator[None]:
    """A run in this block is asked to end by SIGINT, SIGTERM and, unless it is ignored (`nohup`),
    SIGHUP."""
    numbers = tuple(n for n in SIGNALS if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN)
    with _begun(Watch(numbers, answer=end_here, insist=end_here)):
        yield


@contextmanager
def deferring() -> Iterator[None]:
    """In this block Python's handlers, Ctrl-C's own among them, are called at a ``check`` or at the
    end, or for a second signal."""
    numbers = tuple(n for n in SIGNALS if callable(signal.getsignal(n)) and not isinstance(signal.getsignal(n), int))
    with _begun(Watch(numbers, answer=_as_before, insist=_as_before)):
        yield


@contextmanager
def _begun(watch: Watch) -> Iterator[None]:
    try:
        watch.begin()
        yield
    finally:
        watch.end()


class Finishing:
    """What is asked of work that comes to its own end."""

    def __init__(self, watch: "Watch | None") -> None:
        self._watch, self._before = watch, watch.requests if watch else 0

    @property
    def requested(self) -> bool:
        return self._watch is not None and self._watch.requests > self._before


@contextmanager
def finishing() -> Iterator[Finishing]:
    """A step half done leaves states that belong to no step: the first request waits for the work
    in this block to end."""
    with watching():
        check()
        watch = _current if threading.current_thread() is threading.main_thread() else None
        stop = Finishing(watch)
        if watch is None:
            yield stop
            return
        watch.is_finishing = True
        try:
            yield stop
            watch.settle()
        finally:
            watch.is_finishing = False


@contextmanager
def outside() -> Iterator[None]:
    """Code of the user's own, which looks at nothing: what is due comes at once."""
    watch = _current
    if watch is None:
        yield
        return
    check()
    watch.is_outside = True
    try:
        yield
    finally:
        watch.is_outside = False


def each_outside(items: Iterable[Any]) -> Iterator[Any]:
    """Items that code of the user's own makes."""
    with outside():
        iterator = iter(items)
    while True:
        with outside():
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def end_here(watch: Watch, number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted


def _as_before(watch: Watch, number: int, frame: FrameType | None) -> None:
    watch.previous(number)(number, frame)


def _forget() -> None:
    """Forget the watch in a forked child, whose signals are its own."""
    global _current
    watch, _current = _current, None
    if watch is not None:
        for number, handler in watch._previous.items():
            if handler is not None:
                signal.signal(number, handler)


os.register_at_fork(after_in_child=_forget)
