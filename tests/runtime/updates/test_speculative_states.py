"""What is saved, committed, read and gone on from, while updates are made before the norm is known."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ratel.memory import jitter
from ratel.runtime.states.saved_state import SavedState
from ratel.runtime.states.saver import Saver
from tests.support.families import batches
from tests.support.patience import within
from tests.support.sessions import assert_holds, everything
from tests.support.speculative import MODES, NEVER, PLACES, STEPS, guess, open_speculative, share  # noqa: F401

pytestmark = pytest.mark.numerics


# --- saving and going on ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def after_each_step(tmp_path_factory: pytest.TempPathFactory) -> dict[float, list[dict[str, torch.Tensor]]]:
    """By clipping, what every plane is after each step of deferred updates; nothing was saved."""
    found = {}
    for clip in (NEVER, 1.53):
        with open_speculative(tmp_path_factory.mktemp("ssd"), tier="dram", optimizer="deferred", max_grad_norm=clip) as session:
            found[clip] = [(session.step(batch), everything(session))[1] for batch in batches("llama", STEPS)]
    return found


@pytest.mark.usefixtures("guess", "share")
@pytest.mark.parametrize("clip", [NEVER, 1.53])
@pytest.mark.parametrize(("place", "save_every"), [("dram", 2), ("ssd", 1), ("ssd", 2), ("mixed", 1), ("some on the GPU", 2),
                                                   ("ssd, one of each buffer", 1)])
def test_commits_are_of_what_is_decided(place: str, clip: float, save_every: int, after_each_step: dict, ssd_dir: Path,
                                        tmp_path: Path) -> None:
    """Each is under way while the next step runs; every step's commit is read back, and resumed in
    the other mode."""
    commits, done, draw = tmp_path / "commits", 0, random.Random(f"{place} {clip} {save_every}")
    data = batches("llama", STEPS)
    for part in (3, STEPS - 3):
        options = dict(durable="step", commits=commits, max_grad_norm=clip, optimizer=draw.choice(MODES) if done else
                       "speculative", **PLACES[draw.choice(list(PLACES)) if done else place])
        with jitter.injected(0.003, seed=part), open_speculative(ssd_dir, **options) as session, within():
            if done:
                session.load(commits)
            for _ in range(part):
                session.step(data[done])
                done += 1
                if done % save_every == 0 or done in (3, STEPS):
                    session.commit()
                    if draw.random() < 0.5:
                        session.wait_saved()
                        assert_holds(SavedState(commits), after_each_step[clip][done - 1])
        assert_holds(SavedState(commits), after_each_step[clip][done - 1])


@pytest.mark.usefixtures("guess", "share")
@pytest.mark.parametrize(("place", "clip"), [("dram", NEVER), ("ssd", NEVER), ("mixed", 1.53), ("mixed", NEVER)])
def test_copies_in_the_background_are_of_their_step(place: str, clip: float, after_each_step: dict, ssd_dir: Path,
                                                    tmp_path: Path) -> None:
    with jitter.injected(0.003, seed=7):
        with open_speculative(ssd_dir, durable="checkpoint", max_grad_norm=clip, **PLACES[place]) as session, within():
            paths = []
            for number, batch in enumerate(batches("llama", STEPS)):
                session.step(batch)
                paths.append(session.save(tmp_path / f"step-{number}", wait=False))
    for path, expected in zip(paths, after_each_step[clip], strict=True):
        assert_holds(SavedState(path), expected)


@pytest.mark.usefixtures("guess", "share")
@pytest.mark.parametrize("place", ["dram", "ssd"])
@pytest.mark.parametrize("durable", ["step", "checkpoint"])
def test_a_save_that_is_slow_is_of_its_step(durable: str, place: str, after_each_step: dict, ssd_dir: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates of the next step are made early while it goes on; what it saves must not change for
    them."""
    copy, path = Saver._copy_unit, tmp_path / "state"

    def slowly(*given: Any) -> None:
        time.sleep(0.2)
        copy(*given)

    monkeypatch.setattr(Saver, "_copy_unit", slowly)
    with open_speculative(ssd_dir, durable=durable, commits=path, max_grad_norm=NEVER, **PLACES[place]) as session, within():
        data = batches("llama", STEPS)
        for batch in data[:2]:
            session.step(batch)
        session.commit() if durable == "step" else session.save(path, wait=False)
        session.step(data[2])
        session.wait_saved()
        assert_holds(SavedState(path), after_each_step[NEVER][1])


@pytest.mark.usefixtures("guess", "share")
@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("place", ["dram", "ssd", "mixed"])
def test_a_run_goes_on_in_the_other_mode(place: str, first: str, after_each_step: dict, ssd_dir: Path, tmp_path: Path) -> None:
    second = MODES[1 - MODES.index(first)]
    data = batches("llama", STEPS)
    with open_speculative(ssd_dir, optimizer=first, max_grad_norm=1.53, **PLACES[place]) as session:
        for batch in data[:3]:
            session.step(batch)
        session.save(tmp_path / "state")
    with open_speculative(ssd_dir, optimizer=second, max_grad_norm=1.53, **PLACES[place]) as session:
        session.load(tmp_path / "state")
        for batch in data[3:]:
            session.step(batch)
        found = everything(session)
    assert [name for name in found if not torch.equal(found[name], after_each_step[1.53][-1][name])] == []


@pytest.mark.usefixtures("guess", "share")
@pytest.mark.parametrize("place", ["dram", "ssd", "mixed"])
def test_evaluating_and_exporting_between_steps_sees_the_last_one(place: str, ssd_dir: Path, tmp_path: Path) -> None:
    results = []
    for options in (dict(optimizer="deferred", tier="dram"), PLACES[place]):
        with jitter.injected(0.002, seed=1), open_speculative(ssd_dir, max_grad_norm=1.53, **options) as session, within():
            losses = []
            for number, batch in enumerate(batches("llama", 4)):
                session.step(batch)
                losses.append(session.evaluate(batches("llama", 1, seed=9)))
                if number == 2:
                    session.export(tmp_path / str(len(results)))
            results.append((losses, [f.read_bytes() for f in sorted((tmp_path / str(len(results))).glob("*.safetensors"))]))
    assert results[0] == results[1] and results[0][1]
