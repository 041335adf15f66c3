"""Ctrl-C and SIGTERM between two steps: the first asks, the second insists."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TWICE_S = 1.0
"""`timeout` and service managers tell a process and its group, that is the process twice: one SIGTERM within so long."""


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """In the block SIGTERM does what Ctrl-C does: a run that has not begun its steps takes its files with it, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked_s = -_TWICE_S

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        nonlocal asked_s
        if time.monotonic() - asked_s >= _TWICE_S:
            asked_s = time.monotonic()
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class Interrupted(KeyboardInterrupt):
    """A run that was told to stop. What it completed is written; ``result`` says how far it got."""

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class StopRequest:
    """A flag that a signal sets. A step half done leaves states that belong to no step, so the loop finishes it."""

    def __init__(self) -> None:
        self.requested, self._asked_s = False, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Only the main thread may install handlers; a run in another thread is stopped by whoever owns it.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGTERM and time.monotonic() - self._asked_s < _TWICE_S:
                return
            raise KeyboardInterrupt
        self.requested, self._asked_s = True, time.monotonic()
        # Not print(): the interrupted code may hold its lock.
        os.write(2, b"\nStopping after this step (once more: stop at once, without writing the model)\n")
