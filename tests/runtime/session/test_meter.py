"""What is busy between two steps is in neither, so no resource is busy for longer than a step
takes; bytes are all counted."""

from types import SimpleNamespace

import pytest

from ratel.runtime.session.meter import Meter

pytestmark = pytest.mark.unit


class Engine:
    def __init__(self) -> None:
        self.busy_s, self.moved = 0.0, 0

    def stats(self) -> dict:
        return {"directories": {"a": {"busy_s": self.busy_s, "bytes_read": self.moved, "bytes_written": 2 * self.moved}}}


def test_seconds_are_of_the_step_and_bytes_of_all_since_the_last() -> None:
    engine, updates = Engine(), SimpleNamespace(busy_s=0.0)
    meter = Meter(SimpleNamespace(take_spans=lambda: []), updates, engine)
    engine.busy_s, engine.moved, updates.busy_s = 11.0, 100, 7.0  # after a step, until the next batch is there
    meter.begin()
    engine.busy_s, engine.moved, updates.busy_s = 11.9, 130, 7.4
    usage = meter.read()
    assert usage.busy_s["ssd"] == pytest.approx(0.9) and usage.busy_s["cpu optimizer"] == pytest.approx(0.4)
    assert (usage.bound_by, usage.ssd_read_bytes, usage.ssd_written_bytes) == ("ssd", 130, 260)
    meter.begin()
    assert meter.read().bound_s == 0


def test_a_directory_that_was_not_there_before_counts_from_its_beginning() -> None:
    """A state is written into it between two steps."""
    directories: dict[str, dict] = {}
    meter = Meter(SimpleNamespace(take_spans=lambda: []), SimpleNamespace(busy_s=0.0), SimpleNamespace(stats=lambda: {"directories": directories}))
    directories["state"] = {"busy_s": 5.0, "bytes_read": 0, "bytes_written": 100}
    meter.begin()
    directories["state"] = {"busy_s": 5.5, "bytes_read": 0, "bytes_written": 110}
    usage = meter.read()
    assert usage.busy_s["ssd"] == pytest.approx(0.5) and usage.ssd_written_bytes == 110
