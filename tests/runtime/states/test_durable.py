"""States that last while training goes on: what is saved is of one step, whatever runs meanwhile.

What is left behind is in test_left_behind.py, kills are in test_kill.py, failing drives in
test_faults.py, the format and damage in test_state.py.
"""

import errno
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ratel.errors import RatelError
from ratel.memory import jitter
from ratel.planner.work import Buffers
from ratel.runtime.session.session import Session
from ratel.runtime.states.saved_state import SavedState
from ratel.runtime.states.targets import CommitTarget, DirectoryTarget
from tests.support.durable import on_ssd, open_decaying
from tests.support.families import batches
from tests.support.patience import patience
from tests.support.sessions import MIXED, assert_holds, everything, with_frozen

pytestmark = pytest.mark.e2e
STEPS = 4
PLACES = {"ssd": {"*": "ssd"}, "dram": {"*": "dram"}, "gpu": {"*": "gpu"}, "mixed": MIXED}
MODES = {"eager": 0.0, "deferred": 0.5}


def in_mode(optimizer: str) -> dict[str, Any]:
    return dict(optimizer=optimizer, max_grad_norm=MODES[optimizer])


@pytest.fixture(scope="module")
def after_each_step(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What every plane is after each step, by optimizer mode; nothing was saved."""
    result = {}
    for optimizer in MODES:
        with open_decaying(tmp_path_factory.mktemp("ssd"), tier="dram", **in_mode(optimizer)) as session:
            result[optimizer] = [(session.step(batch), everything(session))[1] for batch in batches("llama", STEPS)]
    return result


@pytest.mark.parametrize("optimizer", MODES)
@pytest.mark.parametrize("place", PLACES)
def test_commits_equal_the_run_without(place: str, optimizer: str, after_each_step: dict, ssd_dir: Path,
                                       tmp_path: Path) -> None:
    """With random delays; each commit is under way while the next step runs. The last but one is
    resumed elsewhere."""
    draw = random.Random(f"{place} {optimizer}")
    for chunk_elements in (2048, 1 << 22):
        commits = tmp_path / f"commits-{chunk_elements}"
        options = dict(durable="step", commits=commits, buffers=Buffers(chunk_elements=chunk_elements), **in_mode(optimizer))
        with jitter.injected(0.003, seed=chunk_elements):
            with open_decaying(ssd_dir, placement=PLACES[place], **options) as session:
                for batch in batches("llama", STEPS)[:-1]:
                    session.step(batch)
                    session.commit()
            assert_holds(SavedState(commits), after_each_step[optimizer][STEPS - 2])
            with open_decaying(ssd_dir, placement=PLACES[draw.choice(list(PLACES))], **options) as session:
                session.load(commits)
                session.step(batches("llama", STEPS)[-1])
                session.commit()
        assert_holds(SavedState(commits), after_each_step[optimizer][STEPS - 1])


@pytest.mark.parametrize("optimizer", MODES)
@pytest.mark.parametrize("place", PLACES)
def test_a_save_in_the_background_is_of_its_step(place: str, optimizer: str, after_each_step: dict, ssd_dir: Path,
                                                 tmp_path: Path) -> None:
    """Byte for byte the file that training would have waited for."""
    def files(name: str, wait: bool) -> list[Path]:
        with jitter.injected(0.003, seed=7):
            with open_decaying(ssd_dir, durable="checkpoint", placement=PLACES[place], **in_mode(optimizer)) as session:
                paths = []
                for number, batch in enumerate(batches("llama", STEPS)):
                    session.step(batch)
                    paths.append(session.save(tmp_path / f"{name}-{number}", wait=wait))
        return paths

    for at_once, later, expected in zip(files("waited", True), files("not", False), after_each_step[optimizer], strict=True):
        for name in ("planes.0", "manifest.json", "commit-0"):
            assert (at_once / name).read_bytes() == (later / name).read_bytes(), (at_once, name)
        assert_holds(SavedState(later), expected)


def held(monkeypatch: pytest.MonkeyPatch, target: type) -> threading.Event:
    """Saves to such a target are not completed before this event."""
    may_finish, finish = threading.Event(), target.finish

    def finish_later(self: Any, training: dict[str, Any]) -> None:
        assert may_finish.wait(patience(60))
        finish(self, training)

    monkeypatch.setattr(target, "finish", finish_later)
    return may_finish


def test_what_is_said_of_a_save_is_of_its_moment_too(ssd_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may go on with the same dictionary while the save is in the background."""
    may_finish, extra = held(monkeypatch, CommitTarget), {"step": 1, "losses": [5.0]}
    with open_decaying(ssd_dir, tier="ssd", durable="step", commits=tmp_path / "commits") as session:
        session.step(batches("llama", 1)[0])
        session.commit(extra=extra)
        extra["step"] = 2
        extra["losses"].append(4.0)
        may_finish.set()
        session.wait_saved()
        assert SavedState(tmp_path / "commits").training["extra"] == {"step": 1, "losses": [5.0]}
        with pytest.raises(RatelError, match="extra: cannot be written as JSON"):
            session.commit(extra={"step": object()})
        session.commit(extra={"step": 3}, wait=True)  # the refusal has ended nothing
    assert SavedState(tmp_path / "commits").training["extra"] == {"step": 3}


@pytest.mark.timeout(60)
def test_an_interrupt_while_a_save_is_asked_for_leaves_nobody_waiting(ssd_dir: Path, tmp_path: Path) -> None:
    """Its updates would be waited for, and by them, for ever."""
    session = open_decaying(ssd_dir, tier="ssd")
    session.step(batches("llama", 1)[0])

    def interrupted(*save: object) -> None:
        raise KeyboardInterrupt

    session._machinery.saver._mail.put = interrupted
    with pytest.raises(KeyboardInterrupt):
        session.save(tmp_path / "state", wait=False)
    with pytest.raises(RatelError, match="ended with an earlier error .KeyboardInterrupt"):
        session.step(batches("llama", 1)[0])
    session.close()
    assert on_ssd(ssd_dir) == set()


def test_a_copy_that_can_neither_be_written_nor_removed_leaves_the_session(ssd_dir: Path, tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has gone read-only: the first error is the one to report, and
    training goes on."""
    def fails(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    steps = batches("llama", 2)
    with open_decaying(ssd_dir, tier="ssd") as session:
        session.step(steps[0])
        with monkeypatch.context() as patch:
            patch.setattr(DirectoryTarget, "finish", fails)
            patch.setattr("ratel.runtime.states.targets.remove_files", fails)
            with pytest.raises(RatelError, match="the state could not be written: Input/output error"):
                session.save(tmp_path / "state")
        session.step(steps[1])
        session.save(tmp_path / "state")
        assert_holds(SavedState(tmp_path / "state"), everything(session))


def test_a_skipped_step_is_committed_too(ssd_dir: Path, tmp_path: Path) -> None:
    """Nothing has changed but the count: the version that is committed stays where it is."""
    for optimizer in MODES:
        commits = tmp_path / optimizer
        with open_decaying(ssd_dir, "patches", durable="step", commits=commits, placement=MIXED,
                          **in_mode(optimizer)) as session:
            outs = []
            for batch in batches("patches", 2):
                outs.append(session.step(batch))
                session.commit()
            bad = {**batches("patches", 1)[0], "x": torch.full((4, 16, 12), torch.inf)}
            outs.append(session.step(bad))
            session.commit(wait=True)
            slots = list(session._machinery.store.versions.current)
            expected = everything(session)
        assert [out.skipped for out in outs] == [False, False, True]
        saved = SavedState(commits)
        assert saved.training["steps"] == 3 and saved.training["updates"] == 2 and saved.commit.slots == slots
        assert_holds(saved, expected)


@pytest.mark.parametrize("places", [("dram", "ssd", "mixed"), ("ssd", "gpu", "ssd")])
def test_frozen_parts_move_between_tiers(places: tuple[str, ...], ssd_dir: Path, tmp_path: Path) -> None:
    """Updates leave them alone, and no state has them: they come from the model, which each session
    is given."""
    def session_on(place: str, **options: Any) -> Session:
        return Session(with_frozen("q_proj", "up_proj", "embed"), device="cpu", ssd=[ssd_dir], lr=1e-3, micro_batch=2, placement=PLACES[place], **options)

    data = batches("llama", 6)
    with session_on("dram") as session:
        for batch in data:
            session.step(batch)
        expected = everything(session)
    commits = tmp_path / "commits"
    for index, place in enumerate(places):
        with session_on(place, durable="step", commits=commits) as session:
            if index:
                session.load(commits)
            for batch in data[2 * index : 2 * index + 2]:
                session.step(batch)
                session.commit()
            found, trained = everything(session), {unit.name: unit.num_trainable for unit in session.plan.spec.units}
    assert found.keys() == expected.keys() and [name for name in found if not torch.equal(found[name], expected[name])] == []
    changing = {name: values[: trained[name.rpartition(".")[0]]] for name, values in expected.items()}
    assert_holds(SavedState(commits), {name: values for name, values in changing.items() if values.numel()})
