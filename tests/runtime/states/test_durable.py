"""States that last while training goes on: what is saved is of one step, whatever runs meanwhile;
and what is left behind.

Kills are in test_kill.py, failing drives in test_faults.py, the format and damage in test_state.py.
"""

import errno
import fcntl
import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ratel.errors import RatelError
from ratel.memory import jitter
from ratel.ownership.stamps import STAMP_BYTES, Stamp, new_volume_name, read_stamp
from ratel.planner.work import Buffers
from ratel.runtime.planning.prepare import usable_bytes
from ratel.runtime.session.session import Session
from ratel.runtime.states.commits import committed_files, remove_leftovers
from ratel.runtime.states.saved_state import SavedState
from ratel.runtime.states.saver import Saver
from ratel.runtime.states.targets import CommitTarget, DirectoryTarget
from ratel.training.states import StateDirectory
from tests.support.commands import start
from tests.support.families import batches
from tests.support.patience import patience, wait_until
from tests.support.resume import assert_same_run, make_model, make_text, train
from tests.support.sessions import MIXED, assert_holds, everything, open_session, with_frozen

pytestmark = pytest.mark.e2e
STEPS = 4
PLACES = {"ssd": {"*": "ssd"}, "dram": {"*": "dram"}, "gpu": {"*": "gpu"}, "mixed": MIXED}
MODES = {"eager": 0.0, "deferred": 0.5}


def open_decaying(ssd: "Path | list[Path]", family: str = "llama", **options: Any) -> Session:
    return open_session(ssd, family, **{"weight_decay": 0.1, **options})


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


# --- what is left behind ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("inputs")
    return make_model(directory / "model"), make_text(directory / "text.jsonl")


@pytest.fixture(scope="module")
def whole(run_inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    train(*run_inputs, out)
    return out


def on_ssd(folder: Path) -> set[str]:
    return {os.path.realpath(path) for path in folder.iterdir()}


def test_from_copies_to_commits_and_back(run_inputs: tuple, whole: Path, ssd_dir: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other way of keeping states has left goes once it is superseded; on other drives,
    too."""
    from ratel.training import loop

    out, states = tmp_path / "out", StateDirectory(tmp_path / "out" / "state")
    starts = [("checkpoint", "a", 2), ("step", "a", 4), ("step", "b", 5), ("checkpoint", "b", 7), ("step", "a", 8)]
    is_over = loop.Loop._is_over
    for index, (durable, folder, stop) in enumerate(starts):
        monkeypatch.setattr(loop.Loop, "_is_over", lambda self, progress: progress.steps >= stop or is_over(self, progress))
        train(*run_inputs, out, save_every=1, durable=durable, tier="ssd", ssd=[ssd_dir / folder], resume=index > 0)
        names = sorted(path.name for path in states.path.iterdir())
        assert names == (["commits"] if durable == "step" else [f"step-{stop:08d}"])
        used = {path for name in "ab" if (ssd_dir / name).is_dir() for path in on_ssd(ssd_dir / name)}
        assert used == committed_files(states.commits)
    assert_same_run(out, whole)


def test_no_state_is_removed_while_another_is_made(run_inputs: tuple, ssd_dir: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """The first commit makes and renames directories; what tidies up beside it would take them for
    leftovers."""
    out, savers, prune, made = tmp_path / "out", [], StateDirectory.prune, Saver.__init__

    def noting(self: Saver, *arguments: Any) -> None:
        savers.append(self)
        made(self, *arguments)

    def prune_alone(self: StateDirectory, *arguments: Any, **options: Any) -> None:
        assert all(saver._save is None for saver in savers)
        prune(self, *arguments, **options)

    monkeypatch.setattr(Saver, "__init__", noting)
    monkeypatch.setattr(StateDirectory, "prune", prune_alone)
    train(*run_inputs, out, save_every=1, durable="checkpoint", tier="ssd", ssd=[ssd_dir], steps=2)
    train(*run_inputs, out, save_every=1, durable="step", tier="ssd", ssd=[ssd_dir], steps=6, resume=True)
    assert len(savers) == 2 and [path.name for path in (out / "state").iterdir()] == ["commits"]


def test_overwriting_a_run_removes_its_ssd_files(run_inputs: tuple, ssd_dir: Path, tmp_path: Path) -> None:
    options = dict(steps=2, save_every=1, ssd=[ssd_dir], tier="ssd")
    train(*run_inputs, tmp_path / "out", durable="step", **options)
    first = on_ssd(ssd_dir)
    train(*run_inputs, tmp_path / "out", durable="step", overwrite=True, **options)
    assert len(on_ssd(ssd_dir)) == 1 and not first & on_ssd(ssd_dir)
    train(*run_inputs, tmp_path / "out", durable="checkpoint", overwrite=True, **options)
    assert on_ssd(ssd_dir) == set()


def test_the_best_copy_stays_beside_the_commits(run_inputs: tuple, ssd_dir: Path, tmp_path: Path) -> None:
    result = train(*run_inputs, tmp_path, save_every=1, durable="step", keep_best=True, ssd=[ssd_dir], tier="ssd")
    best = min(result.eval_losses, key=result.eval_losses.get)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["commits", f"step-{best:08d}"]
    assert SavedState(tmp_path / "state" / "commits").training["steps"] == 8


def commit_once(ssd: "Path | list[Path]", commits: Path) -> None:
    with open_decaying(ssd, tier="ssd", durable="step", commits=commits) as session:
        session.step(batches("llama", 1)[0])
        session.commit()


def test_no_files_stay_without_a_commit(ssd_dir: Path, tmp_path: Path) -> None:
    with open_decaying(ssd_dir, tier="ssd", durable="step", commits=tmp_path / "commits") as session:
        session.step(batches("llama", 1)[0])
        assert [read_stamp(path).owner for path in ssd_dir.iterdir() if "gradients" not in path.name] == [""]
    assert on_ssd(ssd_dir) == set() and not (tmp_path / "commits").exists()


def test_what_kills_leave_goes_and_what_is_spoken_of_stays(ssd_dir: Path, tmp_path: Path) -> None:
    states = StateDirectory(tmp_path)
    commit_once(ssd_dir / "a", states.commits)
    os.rename(states.commits, tmp_path / "commits.old")  # a kill before the second rename of a replacement
    states.prune(1)
    assert (tmp_path / "commits.old").is_dir() and states.newest() == states.commits
    commit_once(ssd_dir / "b", states.commits)
    assert on_ssd(ssd_dir / "a") == set() and not (tmp_path / "commits.old").exists()
    commit_once(ssd_dir / "c", tmp_path / "other")
    os.rename(tmp_path / "other", tmp_path / "commits.old")  # a kill before the older one was discarded
    states.prune(1)
    assert on_ssd(ssd_dir / "c") == set() and len(on_ssd(ssd_dir / "b")) == 1
    os.rename(states.commits, tmp_path / "commits.removed")  # a kill after they were given up
    assert states.newest() is None and on_ssd(ssd_dir / "b") == committed_files(states.commits)
    states.prune(1)
    assert on_ssd(ssd_dir / "b") == set() and list(tmp_path.iterdir()) == []


def test_a_volume_of_a_start_that_was_killed_early_goes_unless_it_is_in_use(ssd_dir: Path, tmp_path: Path) -> None:
    commits, volume = tmp_path / "commits", new_volume_name()
    left, mine = ssd_dir / f"{volume}.0", ssd_dir / f"{new_volume_name()}.0"
    left.write_bytes(bytes(STAMP_BYTES) + Stamp(volume=volume, index=0).pack()), mine.write_bytes(b"mine" * STAMP_BYTES)
    remove_leftovers(commits, [os.fspath(ssd_dir)])
    assert list(ssd_dir.iterdir()) == [mine]
    with open_decaying(ssd_dir, tier="ssd", durable="step", commits=commits) as session:
        session.step(batches("llama", 1)[0])
        working = on_ssd(ssd_dir)
        remove_leftovers(commits, [os.fspath(ssd_dir)])
        assert on_ssd(ssd_dir) == working and len(working) == 3


def test_files_of_a_start_that_was_killed_before_they_were_stamped_go(ssd_dir: Path) -> None:
    """Nobody would come back to these names, which are new for each volume."""
    just_made, made_long, in_use, mine = (ssd_dir / f"{new_volume_name()}.0" for _ in range(4))
    just_made.touch(), in_use.touch(), mine.write_bytes(b"mine")
    with made_long.open("wb") as file:
        file.truncate(1 << 20)  # as a power failure leaves it: the size was written, the stamp was not
    with in_use.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_leftovers(None, [os.fspath(ssd_dir)])
    assert sorted(ssd_dir.iterdir()) == sorted([in_use, mine])


def test_commits_that_cannot_be_read_are_not_passed_over(run_inputs: tuple, ssd_dir: Path, tmp_path: Path) -> None:
    train(*run_inputs, tmp_path, save_every=1, durable="step", keep_best=True, ssd=[ssd_dir], tier="ssd", steps=4)
    commits = tmp_path / "state" / "commits"
    for name in ("commit-0", "commit-1"):
        (commits / name).write_bytes((commits / name).read_bytes()[:50])
    with pytest.raises(RatelError, match=f"neither of its commit records is whole.*Remove {commits} to resume from"):
        train(*run_inputs, tmp_path, resume=True, steps=8)


def test_the_files_that_are_gone_on_with_do_not_count_as_taken(ssd_dir: Path, tmp_path: Path) -> None:
    commits = tmp_path / "commits"
    commit_once([ssd_dir / "a", ssd_dir / "b"], commits)
    files = SavedState(commits).files
    folders = [os.fspath(path.parent) for path in files]
    own_bytes = min(path.stat().st_size for path in files)
    assert usable_bytes(folders, files, (1,) * len(folders)) >= usable_bytes(folders, [], (1,) * len(folders)) + own_bytes > 0


# --- locks --------------------------------------------------------------------------------------------------------


def test_a_second_session_on_the_same_commits_is_refused(ssd_dir: Path, tmp_path: Path) -> None:
    commits = tmp_path / "commits"
    commit_once(ssd_dir, commits)
    with open_decaying(ssd_dir, tier="ssd", durable="step", commits=commits) as first:
        first.load(commits)
        first.step(batches("llama", 1)[0])
        second = open_decaying(ssd_dir, tier="ssd", durable="step", commits=commits)
        second.load(commits)
        with pytest.raises(RatelError, match="cannot be opened.*in use by another.*End the run that uses it"):
            second.step(batches("llama", 1)[0])
        second.close()
        first.step(batches("llama", 1)[0])
        first.commit()
    assert SavedState(commits).training["steps"] == 3


def test_a_lock_goes_with_its_process(ssd_dir: Path, tmp_path: Path) -> None:
    """A child that is killed while it holds everything; nothing has to be cleaned up before the
    next session."""
    commits = tmp_path / "commits"
    child = start(ssd_dir, commits, code=(
        "import signal, sys; from pathlib import Path; from tests.runtime.states.test_durable import *\n"
        "session = open_decaying(Path(sys.argv[1]), tier='ssd', durable='step', commits=Path(sys.argv[2]))\n"
        "session.step(batches('llama', 1)[0]); session.commit(wait=True); print('held', flush=True); signal.pause()"))
    def has_taken_all() -> bool:
        assert child.poll() is None, child.communicate()
        return child.output == "held\n"

    wait_until(has_taken_all, 60)
    with open_decaying(ssd_dir, tier="ssd", durable="step", commits=commits) as session:
        session.load(commits)
        with pytest.raises(RatelError, match="in use by another"):
            session.step(batches("llama", 1)[0])
    child.kill()
    child.wait(timeout=patience(10))
    with open_decaying(ssd_dir, tier="ssd", durable="step", commits=commits) as session:
        session.load(commits)
        session.step(batches("llama", 1)[0])
        session.commit()
    assert SavedState(commits).training["steps"] == 2


def test_checksums_of_the_record_are_of_what_is_there(ssd_dir: Path, tmp_path: Path) -> None:
    """After two commits the older record still speaks of its own version."""
    commits = tmp_path / "commits"
    with open_decaying(ssd_dir, tier="ssd", durable="step", commits=commits) as session:
        for batch in batches("llama", 2):
            session.step(batch)
            session.commit()
    newest = SavedState(commits)
    (commits / f"commit-{newest.commit.sequence % 2}").unlink()
    older = SavedState(commits)
    assert older.training["steps"] == 1 and older.verify() == newest.verify() > 0
    assert not np.array_equal(older.commit.checksums, newest.commit.checksums)
