"""What threads waited for and worked on: each once, from its beginning, on the lane of its
thread."""

import threading
import time

import pytest

from ratel.memory.jobs import in_thread
from ratel.memory.tracing import SHORTEST_S, Tracing
from tests.support.patience import patience

pytestmark = pytest.mark.unit


def test_waits_and_work_have_lane_name_cause_and_bytes() -> None:
    tracing = Tracing()
    with tracing.waiting("before", "it"):
        time.sleep(2 * SHORTEST_S)
    assert not tracing.is_on and not tracing._spans
    tracing.start()
    before_s = time.perf_counter()
    with tracing.waiting("SSD read", "block.1"):
        time.sleep(0.001)
    with tracing.waiting("norm"):
        time.sleep(0.001)
    with tracing.working("cpu optimizer", "block.2", 4096):
        pass
    spans = tracing.stop()
    after_s = time.perf_counter()
    assert sorted((s.lane, s.name, s.cause, s.num_bytes) for s in spans) == [
        ("cpu optimizer", "block.2", "", 4096), ("main waits", "SSD read block.1", "SSD read", 0), ("main waits", "norm", "norm", 0)]
    assert all(before_s <= span.begin_s <= span.end_s <= after_s for span in spans)
    assert all(span.end_s - span.begin_s >= 0.001 for span in spans if span.cause)


def test_a_wait_that_is_over_at_once_is_none_and_short_work_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1.0]
    monkeypatch.setattr("ratel.memory.tracing.perf_counter", lambda: now[0])
    tracing = Tracing()
    tracing.start()
    for took_s in (SHORTEST_S / 2, SHORTEST_S * 2):
        with tracing.waiting("lock"):
            now[0] += took_s
        with tracing.working("lane", f"{took_s}", 1):
            now[0] += took_s
    assert len([s for s in tracing.stop() if s.lane == "main waits"]) == 1
    assert len(tracing._spans) == 3


def test_what_still_goes_on_ends_with_the_trace_and_is_there_once() -> None:
    tracing, begun, may_end = Tracing(), threading.Event(), threading.Event()

    def wait() -> None:
        with tracing.waiting("gradient", "block.3"):
            begun.set()
            assert may_end.wait(patience(30))
        with tracing.waiting("after", "the end"):
            time.sleep(0.001)

    job = in_thread("ratel-updater", wait)
    assert begun.wait(patience(10))
    tracing.start()
    time.sleep(0.002)
    [span] = tracing.stop()
    assert (span.lane, span.name) == ("updater waits", "gradient block.3") and not tracing.is_on
    may_end.set()
    job.result()
    tracing.start()
    assert tracing.stop() == []


def test_a_record_that_ended_meanwhile_counts_once() -> None:
    tracing = Tracing()
    tracing.start()
    activity = tracing.waiting("x")
    with activity:
        time.sleep(0.001)
        tracing.add(activity)  # as a stop does that comes between
    assert len(tracing._spans) == 2
    [span] = tracing.stop()
    assert span.end_s - span.begin_s >= 0.001


def test_each_thread_has_an_activity_of_its_own() -> None:
    tracing = Tracing()
    mine = tracing.waiting("a")
    assert tracing.waiting("b") is mine and mine.cause == "b"
    assert in_thread("ratel-reader", lambda: tracing.waiting("c")).result() is not mine
    assert mine.cause == "b"
