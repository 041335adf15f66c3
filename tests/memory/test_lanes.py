"""Lanes of a CPU device, and the record of what ran on them."""

from contextlib import nullcontext
from time import perf_counter

import pytest
import torch

from ratel.memory import jitter
from ratel.memory.lanes import Event, Lanes, LaneSpan

pytestmark = pytest.mark.unit


def test_on_a_cpu_everything_is_reached_when_a_call_returns() -> None:
    lanes = Lanes(torch.device("cpu"))
    event = lanes.record("compute")
    lanes.wait("h2d", event), lanes.wait("d2h", None)
    event.synchronize()
    lanes.synchronize()
    with lanes.computing(), lanes.on("d2h"):
        pass
    assert not lanes.is_cuda and lanes.device.type == "cpu"


def test_an_event_of_a_device_is_waited_for() -> None:
    class Device:
        waited = 0

        def synchronize(self) -> None:
            self.waited += 1

    device = Device()
    Event(device).synchronize()
    assert device.waited == 1


def test_work_is_noted_with_lane_label_bytes_and_time() -> None:
    lanes, before_s = Lanes(torch.device("cpu")), perf_counter()
    with lanes.work("h2d", "block.1", 64):
        with lanes.work("compute", "inside"):
            pass
    after_s = perf_counter()
    inside, outside = lanes.take_spans()
    assert (outside.lane, outside.label, outside.num_bytes, inside.num_bytes) == ("h2d", "block.1", 64, 0)
    assert before_s <= outside.begin <= inside.begin <= inside.end <= outside.end <= after_s
    assert outside.seconds == outside.end - outside.begin and outside.done() and outside.launched_s is None
    assert lanes.take_spans() == []


def test_what_still_runs_is_left_for_the_next_time() -> None:
    lanes = Lanes(torch.device("cpu"))
    running, over = LaneSpan("h2d", "runs", 1.0), LaneSpan("h2d", "over", 1.0, end=2.0)
    lanes.spans = [running, over]
    assert lanes.take_spans() == [over] and lanes.spans == [running] and not running.done()


def test_a_span_of_a_device_is_over_when_its_event_is() -> None:
    class Moment:
        def __init__(self, is_reached: bool) -> None:
            self.is_reached = is_reached

        def query(self) -> bool:
            return self.is_reached

        def elapsed_time(self, other: object) -> float:
            return 2500.0

    assert not LaneSpan("h2d", "x", Moment(True), end=Moment(False)).done()
    span = LaneSpan("h2d", "x", Moment(True), end=Moment(True))
    assert span.done() and span.seconds == 2.5


def test_a_trace_has_what_ran_in_it_and_nothing_else() -> None:
    lanes = Lanes(torch.device("cpu"))
    with lanes.work("compute", "before"):
        pass
    lanes.take_spans()
    lanes.start_trace()
    before_s = perf_counter()
    for label in ("taken", "left"):
        with lanes.work("d2h", label, 8):
            pass
        if label == "taken":
            lanes.take_spans()
    lanes.spans.append(LaneSpan("compute", "never over", perf_counter()))
    spans, error_s = lanes.stop_trace()
    assert [(s.lane, s.name, s.num_bytes) for s in spans] == [("d2h", "taken", 8), ("d2h", "left", 8)] and error_s == 0.0
    assert all(before_s <= s.launched_s <= s.begin_s <= s.end_s for s in spans)
    with lanes.work("compute", "after"):
        pass
    assert lanes._traced is None and lanes.spans[-1].launched_s is None


def test_delays_are_drawn_as_often_as_was_asked_and_as_the_seed_says() -> None:
    slept: list[float] = []

    def delays(seed: int, probability: float) -> list[float]:
        with jitter.injected(0.5, seed=seed, probability=probability) as given:
            drawn = [given.draw() for _ in range(200)]
        assert given.count == 200 and all(0 <= delay < 0.5 for delay in drawn)
        return drawn

    assert delays(1, 0.5) == delays(1, 0.5) != delays(2, 0.5)
    assert not any(delays(1, 0.0)) and all(delays(1, 1.0))
    assert 50 < sum(delay > 0 for delay in delays(3, 0.5)) < 150
    assert slept == []


def test_a_pause_sleeps_for_what_was_drawn_and_only_while_delays_are_injected(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(jitter.time, "sleep", slept.append)
    jitter.pause()
    with jitter.injected(0.5, seed=1, probability=1.0) as outer:
        jitter.pause()
        with jitter.injected(0.0, probability=0.0) as inner:
            jitter.pause(on_stream=True)
            assert inner.count == 1
        jitter.pause(on_stream=True)
        assert outer.count == 2
    jitter.pause()
    assert len(slept) == 2 and all(0 < delay < 0.5 for delay in slept)


# --- a stand-in for a GPU: what is recorded where, and who is made to wait ----------------------------------------------


class Stream:
    def __init__(self, device: object = None) -> None:
        self.waited: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)

    wait_stream = wait_event


class Moment:
    """An event; its time is that of a clock which runs half as fast as the host's."""

    now_s = 0.0

    def __init__(self, **options: bool) -> None:
        self.options, self.stream, self.at_s, self.synchronized = options, None, None, 0

    def record(self, stream: Stream) -> None:
        self.stream, self.at_s = stream, Moment.now_s

    def synchronize(self) -> None:
        self.synchronized += 1

    def elapsed_time(self, other: "Moment") -> float:
        return (other.at_s - self.at_s) / 2 * 1e3

    def query(self) -> bool:
        return True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Lanes:
    current = Stream()
    monkeypatch.setattr(Moment, "now_s", 0.0)
    for name, stand_in in {"current_stream": lambda device=None: current, "Stream": Stream, "Event": Moment,
                           "stream": lambda stream: nullcontext(stream), "synchronize": lambda device=None: None}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr("ratel.memory.lanes.perf_counter", lambda: Moment.now_s)
    lanes = Lanes(torch.device("cuda"))
    assert lanes.is_cuda and lanes._streams["compute"] is current
    return lanes


def test_an_event_is_of_the_lane_that_was_asked_for_and_makes_another_wait(gpu: Lanes) -> None:
    event = gpu.record("h2d")
    assert event._event.stream is gpu._streams["h2d"] and event._event.options == {"blocking": True}
    gpu.wait("compute", event), gpu.wait("d2h", None), gpu.wait("d2h", Event())
    assert gpu._streams["compute"].waited == [event._event] and not gpu._streams["d2h"].waited
    event.synchronize()
    assert event._event.synchronized == 1
    assert len({id(stream) for stream in gpu._streams.values()}) == 3


def test_computing_comes_after_what_the_callers_stream_was_given(gpu: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    callers = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: callers)
    with gpu.computing():
        assert gpu._streams["compute"].waited == [callers]
    with gpu.on("h2d") as stream:
        assert stream is gpu._streams["h2d"]


def test_times_of_a_device_are_those_of_the_host_at_both_ends(gpu: Lanes) -> None:
    Moment.now_s = 10.0
    gpu.start_trace()
    Moment.now_s = 12.0
    with gpu.work("d2h", "copy", 8):
        Moment.now_s = 15.0
    Moment.now_s = 20.0
    [span], error_s = gpu.stop_trace()
    assert (span.begin_s, span.end_s, span.launched_s) == (12.0, 15.0, 12.0) and error_s == 5.0
    assert (span.lane, span.num_bytes) == ("d2h", 8)


def test_a_mark_is_the_shortest_of_several_round_trips_and_in_its_middle(gpu: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    took_s = iter([9.0, 3.0, 1.0, 5.0, 9.0, 9.0, 9.0, 9.0])
    made: list[Moment] = []

    def synchronize(self: Moment) -> None:
        made.append(self)
        Moment.now_s += next(took_s)

    monkeypatch.setattr(Moment, "synchronize", synchronize)
    mark = gpu._mark()
    assert len(made) == 8 and mark.event is made[2] and mark.host_s == 12.5
    assert all(moment.options == {"enable_timing": True} and moment.stream not in gpu._streams.values() for moment in made)


def test_a_delay_holds_up_the_stream_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cycles: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(jitter.time, "sleep", lambda delay_s: None)
    with jitter.injected(0.5, seed=1, probability=1.0) as delays:
        jitter.pause()
        assert not cycles
        jitter.pause(on_stream=True)
        assert len(cycles) == 1 and 0 < cycles[0] < 0.75e9 and delays.count == 2
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with jitter.injected(0.5, seed=1, probability=1.0):
        jitter.pause(on_stream=True)
    assert len(cycles) == 1
