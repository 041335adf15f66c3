"""Streams and events behind names, so that one code path serves CUDA and CPU.

Three lanes: ``compute`` (the caller's current stream), ``h2d`` and ``d2h``. On a CPU device work is
done when a call returns, so events carry no state and waiting for one is free.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter

import torch

from ratel.memory import jitter
from ratel.trace import timeline

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
class LaneSpan:
    """Work of one lane between two moments: CUDA events, or seconds of ``time.perf_counter`` on a
    CPU device."""

    lane: str
    label: str
    begin: "torch.cuda.Event | float"
    num_bytes: int = 0
    launched_s: float | None = None
    """When its enqueueing began, while a step is traced."""
    end: "torch.cuda.Event | float | None" = None

    def done(self) -> bool:
        return self.end is not None and (isinstance(self.end, float) or self.end.query())

    @property
    def seconds(self) -> float:
        if isinstance(self.begin, float):
            return self.end - self.begin
        return self.begin.elapsed_time(self.end) / 1e3


@dataclass(frozen=True, slots=True)
class Mark:
    """One moment on the device's clock and on the host's (``perf_counter``)."""

    event: "torch.cuda.Event | None"
    host_s: float


MARK_TRIES = 8
"""Round trips of which the shortest counts: the first one after a while takes 50 us, the others
10."""


class Lanes:
    """The streams of one device, and the record of what ran on them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.spans: list[LaneSpan] = []
        self._traced: list[LaneSpan] | None = None
        """What `take_spans` has handed out since `start_trace`."""
        self._streams: dict[str, torch.cuda.Stream] = {}
        if self.is_cuda:
            # The session's compute stream is the stream current at construction: what the user's
            # own code uses.
            self._streams["compute"] = torch.cuda.current_stream(device)
            self._streams["h2d"] = torch.cuda.Stream(device)
            self._streams["d2h"] = torch.cuda.Stream(device)

    def on(self, lane: str) -> AbstractContextManager:
        """Make the lane's stream current for the calling thread."""
        return torch.cuda.stream(self._streams[lane]) if self.is_cuda else nullcontext()

    def computing(self) -> AbstractContextManager:
        """Make the compute lane current, after what the caller's own current stream was given:
        perhaps the batch."""
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
        """Let nothing more of the lane run before the event is reached. Does not block the
        caller."""
        if self.is_cuda and event is not None and event._event is not None:
            self._streams[lane].wait_event(event._event)

    @contextmanager
    def work(self, lane: str, label: str, num_bytes: int = 0) -> Iterator[None]:
        """Run the body on the lane and record when it ran; ``num_bytes`` is what a copy moves."""
        with self.on(lane):
            jitter.pause(on_stream=self.is_cuda)
            launched_s = perf_counter() if self._traced is not None else None
            span = LaneSpan(lane, label, self._now(lane), num_bytes, launched_s)
            yield
            span.end = self._now(lane)
            self.spans.append(span)

    def take_spans(self) -> list[LaneSpan]:
        """The spans completed since the last call; those still running are left for the next."""
        spans, self.spans = self.spans, []
        done: list[LaneSpan] = []
        for span in spans:
            (done if span.done() else self.spans).append(span)
        if self._traced is not None:
            self._traced += done
        return done

    def start_trace(self) -> None:
        """Keep what runs from now on, and what runs now."""
        self._began = self._mark()
        self._traced = []

    def stop_trace(self) -> tuple[list[timeline.Span], float]:
        """All work since `start_trace`, complete, in seconds of ``perf_counter``; and how far the
        clocks grew apart.

        The device's times are stretched between two marks, so that they are right at both.
        """
        self.synchronize()
        spans, self._traced = [*self._traced, *(s for s in self.spans if s.done())], None
        if not self.is_cuda:
            return [_placed(span, span.begin, span.end) for span in spans], 0.0
        began, ended = self._began, self._mark()
        host_s, device_s = ended.host_s - began.host_s, began.event.elapsed_time(ended.event) / 1e3

        def on_host(event: "torch.cuda.Event") -> float:
            return began.host_s + began.event.elapsed_time(event) / 1e3 * host_s / device_s

        return [_placed(span, on_host(span.begin), on_host(span.end)) for span in spans], host_s - device_s

    def _mark(self) -> Mark:
        """A mark on a stream of its own, which has nothing to wait for."""
        if not self.is_cuda:
            return Mark(None, perf_counter())
        stream, marks = torch.cuda.Stream(self.device), []
        for _ in range(MARK_TRIES):
            event, before_s = torch.cuda.Event(enable_timing=True), perf_counter()
            event.record(stream)
            event.synchronize()
            after_s = perf_counter()
            marks.append((after_s - before_s, Mark(event, (before_s + after_s) / 2)))
        return min(marks, key=lambda mark: mark[0])[1]

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def _now(self, lane: str) -> "torch.cuda.Event | float":
        if not self.is_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._streams[lane])
        return event


def _placed(span: LaneSpan, begin_s: float, end_s: float) -> timeline.Span:
    return timeline.Span(lane=span.lane, name=span.label, begin_s=begin_s, end_s=end_s, num_bytes=span.num_bytes,
                         launched_s=span.launched_s)
