"""Streams and events behind names, so that one code path serves CUDA and CPU.

Three lanes: ``compute`` (the caller's current stream), ``h2d`` and ``d2h``. On a CPU device work is done when a call
returns, so events carry no state and waiting for one is free.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from ratel.memory import jitter

LANES = ("compute", "h2d", "d2h")


class Event:
    """A point in a lane's work. ``None`` inside means: already reached."""

    __slots__ = ("_event",)

    def __init__(self, event: "torch.cuda.Event | None" = None) -> None:
        self._event = event

    def synchronize(self) -> None:
        """Block the calling thread until the point is reached (without holding the GIL)."""
        if self._event is not None:
            self._event.synchronize()


@dataclass(slots=True)
class Span:
    """Work of one lane between two moments: CUDA events, or seconds of ``time.perf_counter`` on a CPU device."""

    lane: str
    label: str
    begin: "torch.cuda.Event | float"
    end: "torch.cuda.Event | float | None" = None

    def done(self) -> bool:
        return self.end is not None and (isinstance(self.end, float) or self.end.query())

    @property
    def seconds(self) -> float:
        if isinstance(self.begin, float):
            return self.end - self.begin
        return self.begin.elapsed_time(self.end) / 1e3


class Lanes:
    """The streams of one device, and the record of what ran on them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.spans: list[Span] = []
        self._streams: dict[str, torch.cuda.Stream] = {}
        if self.is_cuda:
            # The session's compute stream is the stream current at construction: what the user's own code uses.
            self._streams["compute"] = torch.cuda.current_stream(device)
            self._streams["h2d"] = torch.cuda.Stream(device)
            self._streams["d2h"] = torch.cuda.Stream(device)

    def on(self, lane: str) -> AbstractContextManager:
        """Make the lane's stream current for the calling thread."""
        return torch.cuda.stream(self._streams[lane]) if self.is_cuda else nullcontext()

    def computing(self) -> AbstractContextManager:
        """Make the compute lane current, after what the caller's own current stream was given: perhaps the batch."""
        if self.is_cuda:
            self._streams["compute"].wait_stream(torch.cuda.current_stream(self.device))
        return self.on("compute")

    def record(self, lane: str) -> Event:
        """The point that the lane's work has got to so far."""
        if not self.is_cuda:
            return Event()
        event = torch.cuda.Event(blocking=True)
        event.record(self._streams[lane])
        return Event(event)

    def wait(self, lane: str, event: Event | None) -> None:
        """Let nothing more of the lane run before the event is reached. Does not block the caller."""
        if self.is_cuda and event is not None and event._event is not None:
            self._streams[lane].wait_event(event._event)

    @contextmanager
    def work(self, lane: str, label: str) -> Iterator[None]:
        """Run the body on the lane and record when it ran."""
        with self.on(lane):
            jitter.pause(on_stream=self.is_cuda)
            span = Span(lane, label, self._now(lane))
            yield
            span.end = self._now(lane)
            self.spans.append(span)

    def take_spans(self) -> list[Span]:
        """The spans completed since the last call; those still running are left for the next."""
        spans, self.spans = self.spans, []
        done: list[Span] = []
        for span in spans:
            (done if span.done() else self.spans).append(span)
        return done

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def _now(self, lane: str) -> "torch.cuda.Event | float":
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._streams[lane])
        return event
