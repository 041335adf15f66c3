"""The loop and the run around it, over a stand-in for the session: what is recorded, when it ends,
what is left."""

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ratel import interrupt
from ratel.errors import NonFiniteError, RatelError
from ratel.interrupt import Interrupted
from ratel.training.inputs import endless
from ratel.training.loop import MAX_SKIPPED_IN_A_ROW, Loop, Progress
from ratel.training.output import RunDirectory, choose
from ratel.training.summary import summarize
from tests.support.fake_session import FakeSession, run_loop

pytestmark = pytest.mark.unit


def test_each_step_is_recorded_with_its_rate() -> None:
    session = FakeSession()
    progress, records = run_loop(session, [3.0, 2.0, 1.0, 0.0, 9.0], steps=4)
    assert progress.losses == [3.0, 2.0, 1.0, 0.0] and progress.tokens == 400
    assert session.rates == [1.0, 0.75, 0.5, 0.25]
    assert records[1] == {"step": 2, "loss": 2.0, "grad_norm": 1.0, "lr": 0.75, "tokens": 100, "step_s": 0.5,
                          "tokens_per_s": 200.0, "bound_s": 0.25, "bound_by": "ssd", "skipped": False,
                          "early_units": 3, "redone_units": 0,
                          "ssd_read_bytes": 7, "ssd_written_bytes": 6}


def test_it_ends_with_the_data() -> None:
    progress, records = run_loop(FakeSession(), [1.0, 2.0], steps=10)
    assert progress.steps == len(records) == 2


def test_evaluation_comes_at_intervals_and_at_the_end() -> None:
    progress, records = run_loop(FakeSession(), [1.0] * 5, steps=5, evaluation=lambda: [2.0, 4.0], eval_every=2)
    assert progress.eval_losses == {2: 3.0, 4: 3.0, 5: 3.0}
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4, 5]


def test_the_end_is_not_evaluated_twice() -> None:
    session = FakeSession()
    run_loop(session, [1.0] * 4, steps=4, evaluation=lambda: [1.0], eval_every=2)
    assert session.calls == ["evaluate", "evaluate"]


def test_too_many_skipped_steps_in_a_row_end_the_run() -> None:
    losses = [1.0, *[math.nan] * (MAX_SKIPPED_IN_A_ROW + 5)]
    records: list[dict] = []
    with pytest.raises(RatelError, match=r"not finite for 10 steps in a row, up to step 11.*Lower --lr"):
        Loop(session=FakeSession(), steps=50, schedule=lambda step: 0.1, record=records.append, stop=interrupt.Finishing(None)
             ).run(iter(losses), Progress())
    assert len(records) == 1 + MAX_SKIPPED_IN_A_ROW and records[-1]["skipped"]


def test_skipped_steps_with_good_ones_between_do_not() -> None:
    losses = [math.nan] * (MAX_SKIPPED_IN_A_ROW - 1) + [1.0]
    progress, _ = run_loop(FakeSession(), losses * 2, steps=2 * len(losses))
    assert progress.steps == 2 * len(losses)


def test_an_eager_update_that_cannot_be_taken_back_is_explained() -> None:
    def act(number: int) -> None:
        if number == 2:
            raise NonFiniteError("inf in block.3")

    with pytest.raises(RatelError, match="step 2 has a gradient that is not finite.*--optimizer deferred skips"):
        run_loop(FakeSession(act), [1.0] * 3, steps=3)


def interrupt_at(step: int, times: int = 1, number: int = signal.SIGINT) -> Any:
    def act(now: int) -> None:
        if now == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return act


def test_ctrl_c_lets_the_step_finish() -> None:
    progress, records = run_loop(FakeSession(interrupt_at(2)), [1.0] * 9, steps=9, evaluation=lambda: [1.0],
                                 eval_every=1)
    assert progress.steps == 2 and "eval_loss" not in records[1]


def test_held_out_batches_of_the_users_own_are_tried_after_the_first_step() -> None:
    given: list[int] = []

    def held_out() -> Iterator[float]:
        for loss in (2.0, 4.0):
            given.append(len(session.rates))
            yield loss

    session = FakeSession()
    progress, records = run_loop(session, [1.0] * 3, steps=3, evaluation=held_out, tries_evaluation=True)
    assert given == [1, 3, 3] and progress.eval_losses == {3: 3.0}
    assert ["eval_loss" in record for record in records] == [False, False, True]
    given.clear()
    session = FakeSession()
    run_loop(session, [1.0], steps=1, evaluation=held_out, tries_evaluation=True)
    assert given == [1, 1]


def test_a_sigterm_that_comes_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` tells the process and then its group."""
    progress, _ = run_loop(FakeSession(interrupt_at(2, times=2, number=signal.SIGTERM)), [1.0] * 9, steps=9)
    assert progress.steps == 2
    monkeypatch.setattr(interrupt, "TWICE_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_loop(FakeSession(interrupt_at(2, times=2, number=signal.SIGTERM)), [1.0] * 9, steps=9)


def test_a_sigterm_before_the_first_step_is_a_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interrupt.watching():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the group's
        with pytest.raises(Interrupted):
            interrupt.check()
        interrupt.check()  # it has been answered
        monkeypatch.setattr(interrupt, "TWICE_S", 0.0)
        with interrupt.finishing() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            interrupt.check()
            assert stop.requested
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted):
                interrupt.check()
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_twice_does_not() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_loop(FakeSession(interrupt_at(2, times=2)), [1.0] * 9, steps=9)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_batches_are_gone_through_again_and_generators_once() -> None:
    again = endless([1, 2])
    assert [next(again) for _ in range(5)] == [1, 2, 1, 2, 1]
    assert list(endless(number for number in (1, 2))) == [1, 2]
    with pytest.raises(RatelError, match="there is no batch in it"):
        next(endless([]))


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``train`` on a fake session that acts as told; returns the session for a look at its
    calls."""
    import ratel.training.run as module

    def start(act: Any = lambda number: None, **options: Any) -> tuple[FakeSession, Any]:
        session = FakeSession(act)
        monkeypatch.setattr(module, "open_session", lambda *args, **options: session)
        monkeypatch.setattr("ratel.training.attempt.plan_to_json", lambda plan: {"plan": 1})
        monkeypatch.setattr("ratel.training.attempt.describe_plan", lambda plan: "the plan")
        options = {"steps": 3, "quiet": True, "out": tmp_path / "out", **options}
        return session, lambda: module.train("demo", [3.0, 2.0], **options)

    return start


def test_a_run_leaves_its_results(fake_run: Any, tmp_path: Path) -> None:
    session, start = fake_run(eval_data=[1.5, 2.5])
    result = start()
    assert result.losses == [3.0, 2.0, 3.0] and result.eval_losses == {3: 2.0} and result.steps == 3
    assert session.calls == ["evaluate", "evaluate", "flush", "export", "close"]  # tried after the first step
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "plan.json", "hardware.json",
                                                                     "metrics.jsonl", "startup.json", "model"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["steps"], config["model"], config["data"]) == (3, "demo", "list")
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_interrupted_run_is_complete_up_to_its_last_step(fake_run: Any, tmp_path: Path) -> None:
    session, start = fake_run(interrupt_at(2))
    with pytest.raises(Interrupted, match="stopped after step 2 of 3") as info:
        start()
    assert info.value.result.steps == 2
    assert session.calls == ["flush", "export", "close"]
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_impatiently_interrupted_run_writes_no_model(fake_run: Any, tmp_path: Path) -> None:
    session, start = fake_run(interrupt_at(2, times=2))
    with pytest.raises(Interrupted, match="stopped in step 2 of 3; the model was not written"):
        start()
    assert session.calls == ["close after Interrupted"]
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_failed_run_keeps_its_metrics_and_closes(fake_run: Any, tmp_path: Path) -> None:
    def act(number: int) -> None:
        if number == 3:
            raise OSError("disk on fire")

    session, start = fake_run(act)
    with pytest.raises(OSError, match="on fire"):
        start()
    assert session.calls == ["close after OSError"]
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_earlier_run_is_not_overwritten_unless_told(fake_run: Any, tmp_path: Path) -> None:
    _, start = fake_run()
    start()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    with pytest.raises(RatelError, match="--out: already holds a run.*--overwrite"):
        start()
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
    _, again = fake_run(overwrite=True, steps=1)
    again()
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_run_that_failed_in_its_first_step_does_not_block_the_next(fake_run: Any, tmp_path: Path) -> None:
    def act(number: int) -> None:
        raise OSError("disk on fire")

    _, start = fake_run(act)
    with pytest.raises(OSError, match="on fire"):
        start()
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "metrics.jsonl").read_text()
    _, again = fake_run()
    again()
    assert (tmp_path / "out" / "metrics.jsonl").read_text()


def test_without_out_each_run_gets_a_directory_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        directory = choose(None, "demo", may_exist=False)
        directory.open()
        names.append(str(directory.path))
    assert names == ["runs/demo", "runs/demo-2", "runs/demo-3"]


def test_one_run_at_a_time_in_a_directory(tmp_path: Path) -> None:
    def directory() -> RunDirectory:
        return choose(str(tmp_path / "out"), "demo", may_exist=True)

    with directory() as first:
        first.open()
        first.write_json("config", {"mine": True})
        with directory() as second, pytest.raises(RatelError, match="another run is writing to it"):
            second.open()
        assert "mine" in (tmp_path / "out" / "config.json").read_text(), "the second removed the first one's results"
    with directory() as third:
        third.open()


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RatelError, match="--out: is not a directory"):
        choose(str(tmp_path / "file"), "demo", may_exist=False)
    with pytest.raises(RatelError, match="--out: is not a directory"):
        choose(str(tmp_path / "file" / "below" / "it"), "demo", may_exist=False)


def test_out_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("ratel.training.output.os.access", lambda path, mode: asked.append(Path(path)))
    with pytest.raises(RatelError, match="--out: is not writable .*Give a directory"):
        choose(str(tmp_path / "new" / "below"), "demo", may_exist=False)
    assert asked == [tmp_path] and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"data": 5}, "data: is neither a path nor an iterable"),
    ({"data": [1.0], "eval_data": "text.txt"}, "eval_data: must be batches when data is"),
    ({"data": [1.0], "eval_data": (number for number in [1.0])}, "eval_data: can be gone through only once"),
    ({"data": [1.0], "eval_data": []}, r"eval_data: there is no batch in it \(given: list\)"),
    ({"data": []}, r"data: there is no batch in it \(given: list\)"),
    ({"data": [1.0], "learning_rat": 1}, "learning_rat: is not an option"),
])
def test_mistakes_touch_nothing(fake_run: Any, tmp_path: Path, arguments: dict, message: str) -> None:
    import ratel.training.run as module

    fake_run()
    with pytest.raises(RatelError, match=message):
        module.train("demo", out=tmp_path / "new", quiet=True, **arguments)
    assert not (tmp_path / "new").exists()


def test_the_summary_of_a_longer_run_averages_its_last_losses(tmp_path: Path) -> None:
    out = RunDirectory(tmp_path)
    short = Progress(losses=[3.0, 2.0], tokens=20, train_s=1.0)
    assert "loss 3.0000 -> 2.0000" in list(summarize(short, 1.0, out, exported=False))
    losses = [5.0] * 20 + [1.0, 3.0] * 5
    longer = Progress(losses=losses, tokens=20, train_s=1.0)
    assert "loss 5.0000 -> 2.0000 (mean of the last 10)" in list(summarize(longer, 1.0, out, exported=False))
