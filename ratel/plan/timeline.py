"""What each resource did when, and the trace file that draws it (Perfetto, chrome://tracing)."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """What one resource did from ``begin_s`` to ``end_s``, in seconds from a common start."""

    lane: str
    """The resource: ``compute``, ``h2d``, ``d2h``, ``cpu optimizer``, ``ssd read``, ``ssd write``, ..."""
    name: str
    begin_s: float
    end_s: float


def write_trace(path: str | Path, spans: Iterable[Span]) -> None:
    """Write ``spans`` as Chrome's trace-event JSON, one row per lane in the order in which lanes first appear."""
    Path(path).write_text(json.dumps(trace(spans)), encoding="utf-8")


def trace(spans: Iterable[Span]) -> dict:
    """Complete events (``ph`` X) with times in microseconds, as the format has them, and a name for each row."""
    rows: dict[str, int] = {}
    events = []
    for span in sorted(spans, key=lambda s: (s.begin_s, s.end_s, s.lane, s.name)):
        row = rows.setdefault(span.lane, len(rows))
        events.append({"name": span.name, "cat": span.lane, "ph": "X", "pid": 0, "tid": row,
                       "ts": round(span.begin_s * 1e6, 3), "dur": round((span.end_s - span.begin_s) * 1e6, 3)})
    names = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": lane}}
             for lane, row in rows.items()]
    return {"displayTimeUnit": "ms", "traceEvents": names + events}
