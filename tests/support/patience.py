"""How long tests wait before they call something a hang, which RATEL_TEST_PATIENCE scales. No tests
here.

No test asserts how fast anything is: that is for benchmarks. A time limit only ends what would
never end by itself. Every limit is written for an idle machine and multiplied by one number, so
that a slow machine with others on it passes, too.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FACTOR = float(os.environ.get("RATEL_TEST_PATIENCE", "4"))
PAUSE_S = 0.005


def patience(seconds: float) -> float:
    """What an idle machine needs at the very most, for this machine."""
    return seconds * FACTOR


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Look again and again; what does not come true in time is a failure."""
    end_s = time.monotonic() + patience(seconds)
    while not condition():
        assert time.monotonic() < end_s, "never came true"
        time.sleep(PAUSE_S)


@contextmanager
def within(seconds: float = 10) -> Iterator[None]:
    """Fail, instead of hanging, when the body takes longer."""

    def late(*unused: object) -> None:
        raise AssertionError(f"it hangs: nothing came within {patience(seconds)} s")

    with alarm(patience(seconds), late):
        yield


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """What Ctrl-C does to the body."""
    with alarm(seconds, signal.default_int_handler):
        yield


@contextmanager
def alarm(seconds: float, handler: Callable[..., object]) -> Iterator[None]:
    """The limit of the whole test is kept by the same timer, and goes on afterwards with what is
    left of it."""
    previous, begun_s = signal.signal(signal.SIGALRM, handler), time.monotonic()
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if left_s:
            signal.setitimer(signal.ITIMER_REAL, max(PAUSE_S, left_s - (time.monotonic() - begun_s)))


def counted_calls(function: Callable[[], Any]) -> tuple[Any, int]:
    """The result, and how many Python functions were called for it: work, whatever the machine."""
    calls = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    previous = sys.getprofile()
    sys.setprofile(note)
    try:
        result = function()
    finally:
        sys.setprofile(previous)
    return result, calls
