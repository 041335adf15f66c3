"""Why the compute lane of a step was idle: each moment without computation, by what it waited
for."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ratel.trace.timeline import Span, Timeline

Interval = tuple[float, float]

LAUNCH = "launch"
"""Idle while nothing was awaited: Python had not enqueued the next work yet."""
COPY_IN, COPY_OUT = "copy in", "copy out"

_UPDATED_BY = (("cpu optimizer", "CPU"), ("updater waits", ""), ("loader waits", ""))
_BROUGHT_BY = (("uploader waits", ""), ("reader waits", ""), ("h2d", COPY_IN))
_WORKED_ON_BY = {
    "weights": _BROUGHT_BY,
    "activations": _BROUGHT_BY,
    "update": _UPDATED_BY,
    "update slot": _UPDATED_BY,
}
"""Who brings what is waited for: lanes in the order in which they are asked, the one nearest to its
end first, and what their being busy means (a thread's wait says so itself). They serve in order, so
that whatever they wait for delays it."""

_WITH_AN_IDLE_UPDATER = {"ring slot": "SSD write"}
"""Ring slots that hold no chunk to update are being written back."""


@dataclass(frozen=True, kw_only=True)
class Bubbles:
    busy_s: float
    """Seconds for which the compute lane is busy; with ``idle_s`` they add up to the step."""
    idle_s: dict[str, float]
    """Idle seconds by cause, the largest first: ``weights: SSD read``, ``update: CPU``, ``norm``,
    ``launch``, ..."""

    @property
    def exposed_optimizer_s(self) -> float:
        """Idle because an update was not done, whatever that waited for."""
        return sum((seconds for cause, seconds in self.idle_s.items() if cause.startswith("update")), 0.0)


def find_bubbles(timeline: Timeline) -> Bubbles:
    """Why the compute lane was idle, and for how long. A GPU counts as busy from a stage's first
    kernel to its last."""
    lanes = _lanes(timeline.spans)
    idle: dict[str, float] = defaultdict(float)
    busy_s = at_s = 0.0
    for span in lanes.get("compute", ()):
        begin_s, end_s = max(span.begin_s, at_s), min(span.end_s, timeline.step_s)
        for cause, (a, b) in _gap(lanes, at_s, min(begin_s, timeline.step_s), span):
            idle[cause] += b - a
        busy_s += max(end_s - begin_s, 0.0)
        at_s = max(at_s, end_s)
    for cause, (a, b) in _awaited_by_main(lanes, (at_s, timeline.step_s)):
        idle[cause] += b - a
    return Bubbles(busy_s=busy_s, idle_s=dict(sorted(idle.items(), key=lambda item: -item[1])))


def _gap(lanes: dict[str, list[Span]], begin_s: float, end_s: float, following: Span) -> Iterator[tuple[str, Interval]]:
    """The causes of an idle time before a span. Once that is enqueued, only copies can keep it
    waiting."""
    launched_s = end_s if following.launched_s is None else min(max(following.launched_s, begin_s), end_s)
    yield from _awaited_by_main(lanes, (begin_s, launched_s))
    rest = [(launched_s, end_s)]
    for lane, cause in (("h2d", COPY_IN), ("d2h", COPY_OUT)):
        for _, part in (found := list(_during(lanes, lane, rest))):
            yield cause, part
        rest = _without(rest, [part for _, part in found])
    yield from ((LAUNCH, part) for part in rest if part[0] < part[1])


def _awaited_by_main(lanes: dict[str, list[Span]], idle: Interval) -> Iterator[tuple[str, Interval]]:
    waits = list(_during(lanes, "main waits", [idle]))
    for span, part in waits:
        yield from _explain(lanes, span.cause, part)
    yield from ((LAUNCH, part) for part in _without([idle], [part for _, part in waits]) if part[0] < part[1])


def _explain(lanes: dict[str, list[Span]], cause: str, waiting: Interval) -> Iterator[tuple[str, Interval]]:
    """What keeps those who bring what is waited for; followed further where that is somebody's work
    itself."""
    rest = [waiting]
    for lane, meaning in _WORKED_ON_BY.get(cause, ()):
        found = list(_during(lanes, lane, rest))
        for span, part in found:
            if span.cause in _WORKED_ON_BY:
                yield from _explain(lanes, span.cause, part)
            else:
                reason = meaning or _WITH_AN_IDLE_UPDATER.get(span.cause, span.cause)
                yield f"{cause}: {reason}", part
        rest = _without(rest, [part for _, part in found])
    yield from ((cause, part) for part in rest if part[0] < part[1])


def _lanes(spans: Iterable[Span]) -> dict[str, list[Span]]:
    lanes: dict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: s.begin_s):
        lanes[span.lane].append(span)
    return lanes


def _during(lanes: dict[str, list[Span]], lane: str, pieces: list[Interval]) -> Iterator[tuple[Span, Interval]]:
    """The lane's spans within the pieces. Spans of these lanes do not overlap."""
    spans = lanes.get(lane, [])
    for begin_s, end_s in pieces:
        first = max(bisect_right(spans, begin_s, key=lambda s: s.begin_s) - 1, 0)
        for span in spans[first:]:
            if span.begin_s >= end_s:
                break
            part = max(begin_s, span.begin_s), min(end_s, span.end_s)
            if part[0] < part[1]:
                yield span, part


def _without(pieces: list[Interval], holes: list[Interval]) -> list[Interval]:
    left = []
    for begin_s, end_s in pieces:
        for a, b in sorted(hole for hole in holes if begin_s <= hole[0] and hole[1] <= end_s):
            left.append((begin_s, a))
            begin_s = b
        left.append((begin_s, end_s))
    return left
