"""What commits, and those that were killed while they made one, leave on disk; whose it is, and who removes it."""

import fcntl
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ratel.errors import RatelError
from ratel.ownership.stamps import STAMP_BYTES, Stamp, new_volume_name, read_stamp
from ratel.runtime.planning.prepare import usable_bytes
from ratel.runtime.states.commits import committed_files, remove_leftovers
from ratel.runtime.states.saved_state import SavedState
from ratel.runtime.states.saver import Saver
from ratel.training.states import StateDirectory
from tests.support.commands import start
from tests.support.durable import on_ssd, open_decaying
from tests.support.families import batches
from tests.support.patience import patience, wait_until
from tests.support.resume import assert_same_run, make_model, make_text, train

pytestmark = pytest.mark.e2e


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
        "import signal, sys; from pathlib import Path; from tests.runtime.states.test_left_behind import *\n"
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
