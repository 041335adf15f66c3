"""Metrics reach the file, errors reach the caller, and nobody waits for ever; progress says what it
should."""

import errno
import io
import json
import os
import threading

import pytest
from rich.console import Console

from ratel.monitor.metrics import MetricsWriter, MissingMetricsError
from ratel.monitor.progress import ProgressDisplay, describe_step
from ratel.units import format_seconds
from tests.support.patience import patience

pytestmark = pytest.mark.unit


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_record_is_one_line_in_order(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, max_pending=4) as writer:
        for step in range(500):
            writer.write({"step": step, "text": "ö\n"})
    assert [record["step"] for record in read_lines(path)] == list(range(500))
    assert read_lines(path)[7]["text"] == "ö\n"


def test_flush_makes_records_readable(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1})
        writer.flush()
        assert read_lines(path) == [{"step": 1}]


def test_a_new_run_replaces_and_a_resumed_one_appends(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    for append, expected in ((False, [1]), (True, [1, 1]), (False, [1])):
        with MetricsWriter(path, append=append) as writer:
            writer.write({"step": 1})
        assert [record["step"] for record in read_lines(path)] == expected


def test_numbers_json_does_not_know_become_null(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    assert read_lines(path) == [{"loss": None, "grad_norm": None, "lr": 0.5}]


def test_what_cannot_be_written_is_kept_and_said(tmp_path) -> None:
    """A disk that is full for a while does not end a run, and no line of it is lost."""
    path = tmp_path / "missing" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1})
        for _ in range(2):
            with pytest.raises(MissingMetricsError, match="metrics.jsonl could not be written.*1 of its lines") as info:
                writer.flush()
        assert isinstance(info.value.__cause__, FileNotFoundError)
        assert [len(list(writer.news())) for _ in range(2)] == [1, 0]
        path.parent.mkdir()
        writer.write({"step": 2})
        writer.flush()
        assert list(writer.news()) == [f"{path} can be written again: nothing is missing"]
    assert [record["step"] for record in read_lines(path)] == [1, 2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_never_blocks_the_writer() -> None:
    writer = MetricsWriter("/dev/full", max_pending=2)
    thread = threading.Thread(target=lambda: [writer.write({"step": step}) for step in range(500)], daemon=True)
    thread.start()
    thread.join(timeout=patience(30))
    assert not thread.is_alive(), "write() hangs after the disk is full"
    assert "No space left" in next(writer.news())
    with pytest.raises(MissingMetricsError, match="500 of its lines"):
        writer.close()


def test_half_a_line_does_not_stay(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk takes what it has room for, and refuses the rest."""
    path, real = tmp_path / "metrics.jsonl", os.write
    with MetricsWriter(path) as writer:
        writer.write({"step": 1})
        writer.flush()
        room = iter([4])

        def write(file: int, data) -> int:
            if (count := next(room, None)) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(file, data[:count])

        monkeypatch.setattr(os, "write", write)
        writer.write({"step": 2})
        with pytest.raises(MissingMetricsError):
            writer.flush()
        assert read_lines(path) == [{"step": 1}]
        monkeypatch.setattr(os, "write", real)
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_the_error_that_ended_the_run_is_not_hidden(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError):
        with MetricsWriter(tmp_path / "missing" / "metrics.jsonl") as writer:
            writer.write({"step": 1})
            raise ZeroDivisionError


def record_of(step: int, **changes: object) -> dict:
    return {"step": step, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "tokens": 1000, "step_s": 0.5,
            "tokens_per_s": 2000.0, "bound_s": 0.4, "bound_by": "ssd", "skipped": False, **changes}


def test_a_step_is_described_with_what_binds() -> None:
    text = describe_step(record_of(3, eval_loss=2.25), eta_s=75)
    assert text == "loss 2.5000  eval 2.2500  2,000 tok/s  ssd binds (80%)  ETA 1m 15s"
    assert "skipped" in describe_step(record_of(3, skipped=True), eta_s=0)
    assert "binds" not in describe_step(record_of(3, bound_by=None, bound_s=None), eta_s=0)


def shown(**options: object) -> str:
    out = io.StringIO()
    display = ProgressDisplay(25, console=Console(file=out, width=200, **options), log_every=10)
    display.note("[/mnt/a] is used")
    display.start()
    for step in range(1, 26):
        display.step(record_of(step, **({"eval_loss": 2.0} if step == 7 else {})))
    display.close()
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = shown().splitlines()
    assert lines[0] == "[/mnt/a] is used"
    assert [line.split()[1] for line in lines[1:]] == ["1/25", "7/25", "10/25", "20/25", "25/25"]
    assert lines[3].endswith("ETA 7.50s")  # 15 steps of 0.5 s


def test_a_live_line_on_a_terminal() -> None:
    text = shown(force_terminal=True)
    assert "25/25" in text and "ssd binds" in text
    assert text.count("step 1/25") == 0


def test_quiet_says_nothing(capsys) -> None:
    display = ProgressDisplay(2, quiet=True)
    display.note("text")
    display.start()
    display.step(record_of(1))
    display.close()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0, "0.0ms"), (1.52e-4, "152us"), (0.0123, "12.3ms"), (7.8, "7.80s"), (125.0, "2m 05s"), (7380.0, "2h 03m"),
])
def test_seconds_are_shown_in_a_unit_that_has_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
