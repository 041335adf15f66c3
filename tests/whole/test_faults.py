"""When a drive fails, lies or falls silent in a run that makes its states last: nothing is silent,
hangs or is lost.

What a failing drive does to a session without states is in test_failures.py.
"""

import json
from pathlib import Path

import pytest
import torch

import nvme_ds
from ratel.errors import DamagedError, RatelError, WorkerError
from ratel.runtime.session.session import Session
from ratel.runtime.states.saved_state import SavedState
from ratel.synced import write_synced
from tests.support.commands import start
from tests.support.families import batches, build
from tests.support.patience import patience
from tests.support.resume import assert_same_run, make_model, make_text, train
from tests.support.sessions import flip, open_session
from tests.support.tools import run_tool

pytestmark = pytest.mark.e2e
SEED, FAULTS = 6, 20


@pytest.mark.timeout(300)
def test_every_kind_of_fault_is_harmless_or_said_and_nothing_durable_is_lost(tmp_path: Path, ssd_dir: Path) -> None:
    """Everything is checked where it happens (fault_run.py); here, that the faults were of all
    kinds."""
    done = run_tool("fault_run", ssd_dir, SEED, FAULTS, "--json", tmp_path / "summary.json", limit_s=290)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert found["faults"] == FAULTS and len(found["by_fault"]) == 10 and len(found["by_mode"]) == 6, found
    assert {"write states", "write commit", "write copy"} <= found["by_request"].keys(), found
    said = sum(count for outcome, count in found["by_fault_and_outcome"].items() if "harmless" not in outcome)
    assert said >= FAULTS // 2, found


SILENT = """
import sys
from functools import partial
import nvme_ds

class Silent(nvme_ds.Engine):
    writes = 0

    def submit_write(self, *arguments):
        Silent.writes += 1
        if Silent.writes == int(sys.argv[1]):
            self.inject(stall_op="any")
        return super().submit_write(*arguments)

nvme_ds.Engine = partial(Silent, stall_timeout_s=SILENT_S)
from ratel import cli
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("durable", ["step", "checkpoint"])
def test_a_command_whose_drive_falls_silent_ends_and_can_be_resumed(durable: str, ssd_dir: Path,
                                                                    tmp_path: Path) -> None:
    model, text, out = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl"), tmp_path / "out"
    train(model, text, tmp_path / "whole")
    options = {"--model": model, "--data": text, "--out": out, "--ssd": ssd_dir, "--durable": durable, "--tier": "ssd",
               "--save-every": 1, "--steps": 8, "--batch-size": 2, "--seq-len": 16, "--lr": 1e-3, "--device": "cpu",
               "--dtype": "bf16", "--micro-batch": 2, "--eval-every": 3, "--eval-sequences": 2, "--warmup-steps": 2,
               "--weight-decay": 0.1, "--max-grad-norm": 0.5, "--dram": "4GiB"}
    flags = [str(part) for pair in options.items() for part in pair]
    command = start("110", "train", *flags, code=SILENT.replace("SILENT_S", str(patience(0.5))))
    _, err = command.communicate(timeout=patience(100))
    assert command.returncode == 1 and "the device does not answer" in err and "Traceback" not in err, err
    train(model, None, out, resume=True)
    assert_same_run(out, tmp_path / "whole")


def open_committing(ssd: "Path | list[Path]", commits: Path, **options: object) -> Session:
    return open_session(ssd, durable="step", commits=commits, **{"tier": "ssd", **options})


def test_a_silent_drive_is_let_go_of_with_the_memory_that_it_may_still_write_to(
        ssd_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ratel.memory import arena

    kept: list[object] = []
    monkeypatch.setattr(arena, "_never_freed", kept)
    real = nvme_ds.Engine
    monkeypatch.setattr(nvme_ds, "Engine", lambda **options: real(**options, stall_timeout_s=patience(0.1)))
    session = open_committing(ssd_dir, tmp_path / "commits")
    session.step(batches("llama", 1)[0])
    engine, memory = session._machinery.engine, session._machinery.arena
    engine.inject(stall_op="any")
    with pytest.raises(WorkerError, match="the device does not answer"):
        for batch in batches("llama", 3):
            session.step(batch)
            session.commit(wait=True)
    session.close()
    assert memory in kept
    assert memory.address  # still mapped
    engine.inject()  # the device answers after all, into memory that is nobody else's


def test_a_damaged_byte_is_found_with_its_file_and_place(ssd_dir: Path, tmp_path: Path) -> None:
    """On two drives: the one that is named is the one to replace."""
    folders, commits = [ssd_dir / "a", ssd_dir / "b"], tmp_path / "commits"
    with open_committing(folders, commits) as session:
        session.step(batches("llama", 1)[0])
        session.commit(wait=True)
        store, unit = session._machinery.store, session.plan.spec.units[1]
        path, position = store.volume.locate(store.offset(store.versions.current[1], 1, "m"))
    flip(Path(path), position + 5)
    with open_committing(folders, commits) as session:
        session.load(commits)
        place = f"{path} is damaged at byte {position}: unit {unit.name}, plane m, chunk 0"
        with pytest.raises(WorkerError, match=place) as caught:
            for batch in batches("llama", 2):
                session.step(batch)
            session.flush()
        assert isinstance(caught.value.__cause__, DamagedError) and caught.value.__cause__.path == path
        session.close()


def test_a_checkpoint_of_a_block_that_comes_back_wrong_ends_the_session(ssd_dir: Path) -> None:
    with Session(build("llama"), device="cpu", ssd=[ssd_dir], tier="dram", checkpoint_tier="ssd",
                 micro_batch=2) as session:
        session.step(batches("llama", 1)[0])
        session._machinery.engine.inject(flip_op="read")
        with pytest.raises(WorkerError, match="ratel-activations.0 is damaged at byte .*: the input of block"):
            session.step(batches("llama", 1)[0])
        session.close()


@pytest.mark.parametrize("what", ["sync", "record"])
def test_a_commit_that_fails_ends_the_session_and_leaves_the_one_before(what: str, ssd_dir: Path, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """After it nothing may be written to what the failed record speaks of: it may be whole on
    disk."""
    from ratel.runtime.states import targets as save_targets

    commits = tmp_path / "commits"

    def fails_after_writing(path: Path, content: bytes) -> None:
        write_synced(path, content)
        raise OSError(5, "Input/output error", str(path))

    session = open_committing(ssd_dir, commits)
    for batch in batches("llama", 2):
        session.step(batch)
        session.commit(wait=True)
    with monkeypatch.context() as patch:
        if what == "sync":
            session._machinery.engine.inject(fail_op="sync")
        else:
            patch.setattr(save_targets, "write_synced", fails_after_writing)
        session.step(batches("llama", 3)[2])
        with pytest.raises(WorkerError, match="Input/output error"):
            session.commit()
            session.step(batches("llama", 4)[3])
            session.wait_saved()
    with pytest.raises(RatelError, match="ended with an earlier error"):
        session.step(batches("llama", 1)[0])
    session.close()
    saved = SavedState(commits)
    assert saved.training["steps"] == (2 if what == "sync" else 3) and saved.verify() > 0


def test_a_read_that_fails_in_a_save_is_told_as_it_was(ssd_dir: Path, tmp_path: Path) -> None:
    """Its ticket is used up: waiting for it a second time would tell of that instead."""
    with Session(build("llama"), device="cpu", ssd=[ssd_dir], tier="ssd", micro_batch=2,
                 durable="checkpoint") as session:
        session.step(batches("llama", 1)[0])
        session.flush()
        for after in (0, 3, 9):
            session._machinery.engine.inject(fail_op="read", fail_after_n=after)
            with pytest.raises(RatelError, match="could not be written: read of .* Input/output error"):
                session.save(tmp_path / "state")
            assert not list(tmp_path.iterdir())
        session._machinery.engine.inject()
        session.save(tmp_path / "state")
        expected = session.state_dict()
    found = SavedState(tmp_path / "state")
    assert found.verify() > 0 and torch.isfinite(expected["lm_head.weight"]).all()
