"""What each resource did when, in a real step or a simulated one, and the trace file that draws it
(Perfetto, chrome://tracing)."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ratel.synced import sync_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """What one resource did from ``begin_s`` to ``end_s``, in seconds from a common start."""

    lane: str
    """The resource: ``compute``, ``h2d``, ``d2h``, ``cpu optimizer``, ``ssd read``, ``ssd write``,
    ...; or the thread that waits: ``main waits``, ``reader waits``, ..."""
    name: str
    begin_s: float
    end_s: float
    cause: str = ""
    """What a wait was for."""
    num_bytes: int = 0
    launched_s: float | None = None
    """When the main thread began to enqueue it, for work on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One real step, from the call to its return. Spans may have begun before it or end after
    it."""

    step: int
    step_s: float
    spans: tuple[Span, ...] = field(repr=False)
    clock_error_s: float = 0.0
    """By how much the GPU's clock and the host's grew apart during the step, which the spans' times
    correct."""
    lost: int = 0
    """SSD requests for whose spans there was no room."""

    def write(self, path: str | Path) -> None:
        """The part of every span that is within the step. Raises OSError."""
        inside = [_clipped(span, self.step_s) for span in self.spans if span.end_s > 0 and span.begin_s < self.step_s]
        whole = Span(lane="step", name=f"step {self.step}", begin_s=0.0, end_s=self.step_s)
        write_trace(path, [whole, *inside], about={"step": self.step, "step_s": self.step_s, "lost_requests": self.lost,
                                                   "gpu_clock_error_s": self.clock_error_s})


def _clipped(span: Span, step_s: float) -> Span:
    return Span(lane=span.lane, name=span.name, begin_s=max(span.begin_s, 0.0), end_s=min(span.end_s, step_s),
                cause=span.cause, num_bytes=span.num_bytes)


def write_trace(path: str | Path, spans: Iterable[Span], *, about: dict[str, Any] | None = None) -> None:
    """Write ``spans`` as Chrome's trace-event JSON, one row per lane in the order in which lanes
    first appear; ``about`` goes into the file beside them."""
    content = trace(spans)
    Path(path).write_text(json.dumps({**content, "otherData": about} if about else content), encoding="utf-8")
    sync_file(path)


def trace(spans: Iterable[Span]) -> dict:
    """Complete events (``ph`` X) with times in microseconds, as the format has them, and a name for
    each row.

    Spans of one lane that overlap, as transfers of one SSD do, are spread over several rows of that
    name.
    """
    rows: dict[str, list[tuple[int, float]]] = {}
    names, events = [], []
    for span in sorted(spans, key=lambda s: (s.begin_s, s.end_s, s.lane, s.name)):
        mine = rows.setdefault(span.lane, [])
        place = next((i for i, (_, until_s) in enumerate(mine) if until_s <= span.begin_s), len(mine))
        row = mine[place][0] if place < len(mine) else len(names)
        if place == len(mine):
            names.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": span.lane}})
        mine[place : place + 1] = [(row, span.end_s)]
        events.append(_event(span, row))
    return {"displayTimeUnit": "ms", "traceEvents": names + events}


def _event(span: Span, row: int) -> dict:
    event = {"name": span.name, "cat": span.lane, "ph": "X", "pid": 0, "tid": row, "ts": round(span.begin_s * 1e6, 3),
             "dur": round((span.end_s - span.begin_s) * 1e6, 3)}
    facts = {key: value for key, value in (("waits for", span.cause), ("bytes", span.num_bytes)) if value}
    return {**event, "args": facts} if facts else event
