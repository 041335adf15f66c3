"""What a session's threads wait for and work on, recorded while a step is traced.

A thread notes what it is about to do in an object of its own, and a record is made when that is
over: a wait that began before the traced step is in its trace, and one that is made while nothing
is traced costs two readings of the clock.
"""

import threading
from time import perf_counter
from types import TracebackType

from ratel.trace.timeline import Span

SHORTEST_S = 10e-6
"""A lock that was free a moment later is no wait."""


class Activity:
    """What one thread does, one thing at a time. ``with activity:`` is the time that it takes."""

    __slots__ = ("_lane", "_tracing", "cause", "name", "num_bytes", "lane", "since_s")

    def __init__(self, tracing: "Tracing", thread: str) -> None:
        self._tracing, self._lane = tracing, f"{thread} waits"
        self.cause = self.name = self.lane = ""
        self.num_bytes = 0
        self.since_s: float | None = None

    def begin(self, lane: str | None, cause: str, name: str, num_bytes: int) -> "Activity":
        self.lane, self.cause, self.name, self.num_bytes = lane or self._lane, cause, name, num_bytes
        return self

    def __enter__(self) -> None:
        self.since_s = perf_counter()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tracing.is_on:
            self._tracing.add(self)
        self.since_s = None


class Tracing:
    """``waiting`` and ``working`` are for ``with``, in any thread; not inside each other."""

    def __init__(self) -> None:
        self.is_on = False
        self._own = threading.local()
        self._all: list[Activity] = []
        self._spans: list[Span] = []

    def waiting(self, cause: str, name: str = "") -> Activity:
        """The calling thread waits, for what ``cause`` says and on behalf of what ``name`` says."""
        return self._activity().begin(None, cause, name, 0)

    def working(self, lane: str, name: str, num_bytes: int) -> Activity:
        """The calling thread is the resource ``lane``."""
        return self._activity().begin(lane, "", name, num_bytes)

    def start(self) -> None:
        self._spans.clear()
        self.is_on = True

    def stop(self) -> list[Span]:
        """The spans since ``start``, in seconds of ``time.perf_counter``; what still goes on ends
        now."""
        for activity in list(self._all):
            self.add(activity)
        self.is_on = False
        # What ended in between has been added by its own thread as well.
        return list({(span.lane, span.begin_s): span for span in reversed(self._spans)}.values())

    def add(self, activity: Activity) -> None:
        since_s, now_s = activity.since_s, perf_counter()
        if since_s is None or (activity.cause and now_s - since_s < SHORTEST_S):
            return
        name = f"{activity.cause} {activity.name}".strip()
        self._spans.append(Span(lane=activity.lane, name=name, begin_s=since_s, end_s=now_s, cause=activity.cause,
                                num_bytes=activity.num_bytes))

    def _activity(self) -> Activity:
        try:
            return self._own.activity
        except AttributeError:
            thread = threading.current_thread().name
            name = thread.removeprefix("ratel-") if thread.startswith("ratel-") else "main"
            self._own.activity = Activity(self, name)
            self._all.append(self._own.activity)
            return self._own.activity
