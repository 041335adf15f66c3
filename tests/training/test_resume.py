"""A run that is taken up again ends where it would have ended: the same bits in the model, the same
metrics."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ratel.interrupt import Interrupted
from ratel.runtime.states.saved_state import SavedState
from tests.support.commands import start
from tests.support.families import batches, build, loss_fn_of
from tests.support.patience import patience, wait_until
from tests.support.resume import OPTIONS, assert_same_run, make_model, make_text, records, train

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(model, text, out)
    return out


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have something happen before that step of the next run."""
    import ratel.training.loop as module

    original = module.Loop._step

    def arm(step: int, act: Callable[[], None]) -> None:
        def stepping(self: Any, batch: Any, progress: Any) -> None:
            if progress.steps + 1 == step:
                act()
            original(self, batch, progress)

        monkeypatch.setattr(module.Loop, "_step", stepping)

    return arm


@pytest.fixture
def stop_in(before_step: Any) -> Any:
    return lambda step: before_step(step, lambda: os.kill(os.getpid(), signal.SIGINT))


@pytest.fixture
def fail_in(before_step: Any) -> Any:
    return lambda step: before_step(step, lambda: 1 // 0)


def stopped(step: int, stop_in: Any, *args: Any, **options: Any) -> None:
    stop_in(step)
    with pytest.raises(Interrupted, match=f"stopped after step {step} of 8.*--resume continues"):
        train(*args, **{"save_every": 100, **options})
    stop_in(-1)


def states(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "state").iterdir())


@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_a_stopped_run_ends_as_if_it_had_not_been(step: int, model: Path, text: Path, whole: Path, tmp_path: Path,
                                                  stop_in: Any) -> None:
    """Steps 3 and 8 are to be evaluated, and the request to stop prevents it: the resumed run makes
    up for it."""
    stopped(step, stop_in, model, text, tmp_path)
    assert states(tmp_path) == [f"step-{step:08d}"]
    result = train(model, None, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)
    assert result.losses == [record["loss"] for record in records(whole)] and set(result.eval_losses) == {3, 6, 8}
    assert states(tmp_path) == ["step-00000008"]


def test_the_text_is_gone_through_more_than_twice(model: Path, text: Path, tmp_path: Path) -> None:
    train(model, text, tmp_path, save_every=8)
    position = SavedState(tmp_path / "state" / "step-00000008").training["extra"]["data"]
    assert position["epoch"] >= 2


@pytest.mark.parametrize("elsewhere", [dict(tier="ssd"), dict(tier="dram", optimizer_threads=2), dict(tier="gpu"),
                                       dict(dram="3GiB", tier="ssd", checkpoint_tier="ssd")])
def test_on_other_tiers_with_other_budgets(elsewhere: dict, model: Path, text: Path, whole: Path, tmp_path: Path,
                                           ssd_dir: Path, stop_in: Any) -> None:
    stopped(4, stop_in, model, text, tmp_path / "out")
    ssd = {"ssd": [ssd_dir]} if "ssd" in elsewhere.values() else {}
    train(model, None, tmp_path / "out", resume=True, **elsewhere, **ssd)
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.parametrize("family", ["llama", "patches"])
def test_batches_of_the_users_own(family: str, tmp_path: Path, stop_in: Any) -> None:
    """Three of them: the run goes through them again and again."""
    def arguments(out: str) -> tuple:
        return build(family), batches(family, 3), tmp_path / out

    options = dict(loss_fn=loss_fn_of(family), eval_data=batches(family, 2, seed=9), batch_size=4, max_grad_norm=0)
    train(*arguments("whole"), **options)
    stopped(5, stop_in, *arguments("out"), **options)
    train(*arguments("out"), resume=True, **options)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_what_the_killed_steps_recorded_is_cut_off(model: Path, text: Path, whole: Path, tmp_path: Path,
                                                   fail_in: Any) -> None:
    """As after a kill in step 7: lines beyond the state, the last one torn."""
    fail_in(7)
    with pytest.raises(ZeroDivisionError):
        train(model, text, tmp_path, save_every=4)
    fail_in(-1)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    train(model, text, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_other_options_are_named_and_recorded(model: Path, text: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    train(model, text, tmp_path, save_every=2, steps=2)
    capsys.readouterr()
    train(model, None, tmp_path, resume=True, steps=5, lr=2e-3, betas="0.8,0.95", quiet=False)
    shown = capsys.readouterr().out
    assert "continuing after step 2 from" in shown
    changed = [line for line in shown.splitlines() if ": was " in line]
    assert changed == ["--steps: was 2, is 5", "--lr: was 0.001, is 0.002", "--betas: was 0.9,0.999, is 0.8,0.95"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["steps"], config["lr"], config["seq_len"], config["resume"]) == (5, 2e-3, 16, False)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5]
    assert "step-00000004" in shown or "step-00000005" in shown


def test_a_run_that_is_complete_is_only_exported(model: Path, text: Path, whole: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """As after a kill between the last state and the model, with parts of states left."""
    train(model, text, tmp_path, save_every=3, export=False)
    for name in ("step-00000006.old", "step-00000009.partial"):
        (tmp_path / "state" / name).mkdir()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    train(model, None, tmp_path, resume=True, export=True, quiet=False)
    assert "--steps 8 is reached: nothing is left to train" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and states(tmp_path) == ["step-00000008"]
    assert_same_run(tmp_path, whole)


def test_a_file_that_asks_for_overwriting_can_be_resumed_with(model: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("overwrite = true\nsave-every = 2\n")
    train(model, text, tmp_path / "out", config=file, steps=4, schedule="constant")
    train(model, None, tmp_path / "out", config=file, resume=True, schedule="cosine")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["overwrite"], config["save_every"], config["schedule"]) == (False, 2, "cosine")
    assert [record["step"] for record in records(tmp_path / "out")] == list(range(1, 9))


def test_a_model_object_gets_the_weights_of_a_complete_run(tmp_path: Path) -> None:
    import torch

    first = build("patches")
    options = dict(loss_fn=loss_fn_of("patches"), save_every=8, batch_size=4)
    train(first, iter(batches("patches", 8)), tmp_path, **options)
    again = build("patches")
    train(again, iter(batches("patches", 8)), tmp_path, **options, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_older_states_go_once_newer_ones_are_complete(model: Path, text: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    from ratel.runtime.states import targets as save_targets

    found_while_saving: list[list[str]] = []
    original = save_targets.replace_directory

    def watched(partial: Path, path: Path, *discard: object) -> None:
        found_while_saving.append([name for name in states(tmp_path) if ".partial" not in name])
        original(partial, path, *discard)

    monkeypatch.setattr(save_targets, "replace_directory", watched)
    train(model, text, tmp_path, save_every=2, keep=2)
    assert found_while_saving == [[], ["step-00000002"], ["step-00000002", "step-00000004"],
                                  ["step-00000004", "step-00000006"]]
    assert states(tmp_path) == ["step-00000006", "step-00000008"]


def test_ctrl_c_and_a_new_process(model: Path, text: Path, whole: Path, tmp_path: Path, ssd_dir: Path) -> None:
    out = tmp_path / "out"
    flags = [word for name, value in OPTIONS.items() if name != "quiet"
             for word in ("--" + name.replace("_", "-"), str(value))]
    first = start("train", "--model", model, "--data", text, "--out", out, "--ssd", ssd_dir, "--tier", "ssd", "--ssd-bandwidth",
                  "3MB/s", "--save-every", 100, *flags)  # slow enough to be caught
    def has_made_a_step() -> bool:
        assert first.poll() is None, first.communicate()
        return (out / "metrics.jsonl").exists() and records_so_far(out) > 0

    wait_until(has_made_a_step, 60)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=patience(60))
    assert first.returncode == 130 and "and --resume continues" in err, err
    stopped_after = len(records(out))
    assert stopped_after < 8
    second = start("train", "--out", out, "--resume", "--ssd-bandwidth", "1GB/s")
    shown, err = second.communicate(timeout=patience(90))
    assert second.returncode == 0, err
    assert f"continuing after step {stopped_after} from {out}/state/commits" in shown
    assert "--ssd-bandwidth: was 3000000.0, is 1000000000.0" in shown
    assert_same_run(out, whole)


def records_so_far(out: Path) -> int:
    return (out / "metrics.jsonl").read_bytes().count(b"\n")
