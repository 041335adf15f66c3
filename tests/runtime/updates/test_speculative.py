"""Updates made before the norm is known: kept, made again or forgotten, they lead to the bits of
deferred ones.

Steps are made to guess wrongly on purpose: what a guess is based on is replaced by what the test
wants.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ratel.planner.search.choose
import ratel.runtime.session.training_step
from ratel.errors import RatelError
from ratel.memory import jitter
from ratel.planner.schedule import Gather
from ratel.planner.work import Buffers
from ratel.runtime.planning import prepare
from ratel.runtime.session.result import StepResult
from ratel.runtime.session.session import Session
from ratel.runtime.session.training_step import REMEMBERED_STEPS, Training, expects_no_scaling
from ratel.runtime.states.saved_state import SavedState
from ratel.runtime.states.saver import Saver
from ratel.runtime.streams.gradients import Gradients
from ratel.runtime.streams.step import VerticalStep
from ratel.runtime.streams.weights import WeightSource
from ratel.runtime.updates.jobs import Chunk, Job
from ratel.runtime.updates.loader import Loader
from ratel.runtime.updates.pipeline import OptimizerPipeline
from ratel.store.host_cache import HostSlot
from tests.runtime.session.test_nonfinite import check_skipped_exactly
from tests.support.families import CAUSAL, Reference, batches
from tests.support.patience import within
from tests.support.sessions import MANY, MIXED, SMALL, assert_holds, everything, open_session, with_frozen

pytestmark = pytest.mark.numerics
STEPS = 5
NEVER, ALWAYS = 100.0, 0.1
MODES = ("deferred", "speculative")
ON_THE_GPU = {"*": "dram", "block.0": "gpu", "post": "gpu", "block.3": "ssd"}
# The first block that is updated early has its gradient on SSD, so that it is not; those before and
# after it are.
LATE_AMONG_EARLY = {"*": "ssd", "*.?": {"g": "dram"}, "block.2": {"g": "ssd"}}
PLACES: dict[str, dict[str, Any]] = {
    "dram": dict(tier="dram"),
    "ssd": dict(placement={"*": {p: "ssd" for p in ("hi", "lo", "m", "v")}}),
    "mixed": dict(placement=MIXED),
    "some on the GPU": dict(placement=ON_THE_GPU),
    "ssd, one of each buffer": dict(placement={"*": {p: "ssd" for p in ("hi", "lo", "m", "v")}}, buffers=SMALL,
                                    checkpoint_tier="ssd"),
    "one that is not early among them": dict(placement=LATE_AMONG_EARLY, buffers=SMALL),
    "mixed, many buffers": dict(placement=MIXED, buffers=MANY, checkpoint_tier="dram"),
}


@pytest.fixture
def guess(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], None]:
    """Decides for each step, by its number from 0, whether its updates are made early."""
    def decide_by(policy: Callable[[int], bool]) -> None:
        monkeypatch.setattr(ratel.runtime.session.training_step, "REMEMBERED_STEPS", None)
        monkeypatch.setattr(ratel.runtime.session.training_step, "expects_no_scaling", lambda before: policy(len(before)))

    decide_by(lambda step: True)
    return decide_by


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the share of the units that may be updated early."""
    def of(part: float) -> None:
        monkeypatch.setattr(ratel.planner.search.choose, "EARLY_SHARE", part)

    of(1.0)
    return of


def open_speculative(ssd: Path, family: str = "llama", **options: Any) -> Session:
    return open_session(ssd, family, **{"weight_decay": 0.1, "optimizer": "speculative", **options})


def run(ssd: Path, family: str = "llama", *, steps: int = STEPS, delay_s: float = 0.0, seed: int = 0,
        **options: Any) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    with jitter.injected(delay_s, seed=seed), open_speculative(ssd, family, **options) as session, within():
        return [session.step(batch) for batch in batches(family, steps)], everything(session)


def assert_same_steps(one: tuple, other: tuple) -> None:
    outs, others = ([(out.loss, out.grad_norm, out.skipped) for out in pair[0]] for pair in (one, other))
    assert outs == others
    assert [name for name in one[1] if not torch.equal(one[1][name], other[1][name])] == []


# --- kept, made again, or both by turns -------------------------------------------------------------------------------


def between(norms: list[float]) -> float:
    """A limit that some of the norms exceed."""
    return (sorted(norms)[len(norms) // 2 - 1] + sorted(norms)[len(norms) // 2]) / 2


@pytest.fixture(scope="module")
def deferred(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], tuple]:
    """What a family's run with a limit gives in deferred mode; made once."""
    made: dict[tuple[str, float], tuple] = {}

    def find(family: str, clip: float) -> tuple:
        if (family, clip) not in made:
            made[family, clip] = run(tmp_path_factory.mktemp("ssd"), family, optimizer="deferred", tier="dram",
                                     max_grad_norm=clip)
        return made[family, clip]

    return find


@pytest.mark.usefixtures("guess")
@pytest.mark.parametrize(("family", "place"), [*(("llama", place) for place in PLACES), ("llama-tied", "mixed"),
                                               ("llama-tied", "ssd, one of each buffer"), ("patches", "mixed")])
def test_right_and_wrong_guesses_give_the_bits_of_deferred_updates(family: str, place: str, share: Callable,
                                                                   deferred: Callable, ssd_dir: Path) -> None:
    norms = [out.grad_norm for out in deferred(family, NEVER)[0]]
    for number, clip in enumerate((NEVER, ALWAYS, between(norms))):
        share((1.0, 0.4, 0.75)[number])
        expected = deferred(family, clip)
        found = run(ssd_dir, family, max_grad_norm=clip, **PLACES[place])
        assert_same_steps(found, expected)
        assert all(out.early_units for out in found[0])
        clipped = [out.grad_norm + 1e-6 > clip for out in found[0]]
        assert not any(out.redone_units for out, was in zip(found[0], clipped) if not was)
        assert any(clipped) == (clip != NEVER) and all(clipped) == (clip == ALWAYS)


@pytest.mark.usefixtures("share")
@pytest.mark.parametrize("place", PLACES)
def test_steps_with_and_without_early_updates_follow_each_other(place: str, guess: Callable, deferred: Callable,
                                                                ssd_dir: Path) -> None:
    guess(lambda step: step in (1, 2, 4))
    for clip in (NEVER, ALWAYS):
        found = run(ssd_dir, max_grad_norm=clip, **PLACES[place])
        assert_same_steps(found, deferred("llama", clip))
        assert [out.early_units > 0 for out in found[0]] == [False, True, True, False, True]


@pytest.mark.usefixtures("guess", "share")
def test_the_guess_follows_the_norms_that_were(monkeypatch: pytest.MonkeyPatch, ssd_dir: Path) -> None:
    monkeypatch.undo()  # the real one
    assert not expects_no_scaling([]) and expects_no_scaling([True]) and expects_no_scaling([False, True, True])
    assert not expects_no_scaling([False] * 4 + [True] * 4)
    for clip, speculated in ((NEVER, [0, 1, 1, 1, 1]), (ALWAYS, [0] * STEPS)):
        outs, _ = run(ssd_dir, max_grad_norm=clip, tier="dram")
        assert [int(out.early_units > 0) for out in outs] == speculated
        assert not any(out.redone_units for out in outs)
    assert REMEMBERED_STEPS >= 4


@pytest.mark.usefixtures("guess", "share")
@pytest.mark.parametrize("seed", range(6))
def test_random_delays_at_every_hand_over(seed: int, share: Callable, guess: Callable, deferred: Callable,
                                          ssd_dir: Path) -> None:
    """Each seed is another placement, limit, course of guesses and set of delays."""
    draw = random.Random(seed)
    family, clip = draw.choice(["llama", "llama-tied"]), draw.choice([NEVER, ALWAYS, 1.53])
    for _ in range(2):
        guesses = [draw.random() < 0.8 for _ in range(STEPS)]
        guess(lambda step: guesses[step])
        share(draw.choice([0.3, 0.75, 1.0]))
        options = {**PLACES[draw.choice(list(PLACES))], "checkpoint_tier": draw.choice(["gpu", "dram", "ssd"]),
                   "buffers": draw.choice([SMALL, MANY, Buffers()])}
        assert_same_steps(run(ssd_dir, family, max_grad_norm=clip, delay_s=draw.choice([0.002, 0.005]), seed=seed,
                        **options), deferred(family, clip))


@pytest.mark.usefixtures("guess", "share")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("clip", [NEVER, 1.53])
@pytest.mark.parametrize("family", ["llama", "patches"])
def test_the_weights_are_those_of_torch(family: str, clip: float, dtype: str, ssd_dir: Path) -> None:
    reference = Reference(family, dtype=getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[dtype]), clip=clip, lr=1e-3,
                          weight_decay=0.1, micro_rows=2)
    expected = [reference.step(batch) for batch in batches(family, STEPS)]
    with open_speculative(ssd_dir, family, dtype=dtype, max_grad_norm=clip, placement=MIXED) as session:
        outs = [session.step(batch) for batch in batches(family, STEPS)]
        weights = session.state_dict()
    for (loss, norm), out in zip(expected, outs, strict=True):
        assert out.loss == pytest.approx(loss, rel=1e-5) and out.grad_norm == pytest.approx(norm, rel=1e-4)
    for name, master in reference.masters.items():
        assert torch.equal(weights[name], master.detach()), name


@pytest.mark.usefixtures("guess", "share")
@pytest.mark.parametrize("frozen", [("embed_tokens",), ("layers.0", "layers.2"), ("self_attn",),
                                    ("layers.1", "model.norm", "lm_head")], ids=str)
@pytest.mark.parametrize("place", ["dram", "ssd, one of each buffer", "mixed"])
def test_frozen_parts_stay_with_units_that_change_places(place: str, frozen: tuple[str, ...], ssd_dir: Path) -> None:
    clip = {"dram": 1.2, "mixed": 1.2}.get(place, NEVER)
    expected = run(ssd_dir, model=with_frozen(*frozen), optimizer="deferred", tier="dram", max_grad_norm=clip, steps=4)
    assert_same_steps(run(ssd_dir, model=with_frozen(*frozen), max_grad_norm=clip, steps=4, **PLACES[place]), expected)


@pytest.mark.usefixtures("guess", "share")
def test_weights_that_an_early_update_has_changed_are_nobody_elses(deferred: Callable, ssd_dir: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while an upload of what was there before is late to give them back: made again, it
    must read from SSD."""
    late, done = [], WeightSource.done

    def give_back_late(source: WeightSource, gather: Gather, handle: HostSlot | None) -> None:
        if handle is not None and source._plan.spec.units[gather.unit].name == "block.3":
            late.append((source, gather, handle))
        else:
            done(source, gather, handle)

    monkeypatch.setattr(WeightSource, "done", give_back_late)
    with open_speculative(ssd_dir, max_grad_norm=ALWAYS, **PLACES["ssd"]) as session, within():
        outs = []
        for batch in batches("llama", STEPS):
            outs.append(session.step(batch))
            session.flush()
            assert late
            while late:
                done(*late.pop())
        assert all(out.redone_units for out in outs)
        found = outs, everything(session)
    assert_same_steps(found, deferred("llama", ALWAYS))


@pytest.mark.usefixtures("guess", "share")
def test_an_update_is_made_again_when_the_one_in_vain_has_ended(deferred: Callable, ssd_dir: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """With commits both write the same slot, and a drive may serve the later request first."""
    seen, start = [], Loader._start_chunk

    def noting(loader: Loader, job: Job, begin: int, end: int) -> Chunk:
        if job.after is not None:
            seen.append(job.after.written)
        return start(loader, job, begin, end)

    monkeypatch.setattr(Loader, "_start_chunk", noting)
    assert_same_steps(run(ssd_dir, max_grad_norm=ALWAYS, delay_s=0.02, **PLACES["ssd"]), deferred("llama", ALWAYS))
    assert len(seen) >= STEPS and all(seen)


# --- gradients that are not finite ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("guess", "share")
@pytest.mark.parametrize("poisoned", [None, "lm_head.weight", "model.layers.3.mlp.up_proj.weight",
                                      "model.embed_tokens.weight"])
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_is_not_finite_is_forgotten(place: str, poisoned: str | None, ssd_dir: Path) -> None:
    """Early or late in backward: what was updated before it was noticed is as it was."""
    clip = 1.0 if poisoned is None or "embed" in poisoned else NEVER
    check_skipped_exactly(ssd_dir, poisoned, {**PLACES[place], "optimizer": "speculative", "max_grad_norm": clip})


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


# --- what is planned --------------------------------------------------------------------------------------------------


def test_the_simple_rule_takes_the_units_that_close_first_and_counts_their_memory(ssd_dir: Path) -> None:
    plans = {}
    for optimizer in MODES:
        with open_speculative(ssd_dir, optimizer=optimizer, tier="dram") as session:
            session.prepare(4, 16)
            plans[optimizer] = session.plan
    plan, units = plans["speculative"], plans["speculative"].spec.units
    assert [units[u].name for u in sorted(plan.early)] == ["block.0", "block.1", "block.2", "block.3", "post"][-len(plan.early):]
    assert len(plan.early) == round(0.75 * len(units)) and plan.ssd_items == plans["deferred"].ssd_items
    assert plan.arena_bytes - plans["deferred"].arena_bytes == plan.dram_items["second planes of early updates"]
    early = sum(12 * units[u].num_trainable for u in plan.early)
    assert early <= plan.dram_items["second planes of early updates"] < early + 4096 * 4 * len(plan.early)


def test_states_on_ssd_have_one_more_slot(ssd_dir: Path, tmp_path: Path) -> None:
    for durable, slots in (("off", 1), ("step", 2)):
        for optimizer in MODES:
            with open_speculative(ssd_dir, optimizer=optimizer, durable=durable, commits=tmp_path / optimizer,
                              **PLACES["ssd"]) as session:
                session.prepare(4, 16)
                assert session.plan.num_slots == slots + (optimizer == "speculative")
                assert session.plan.ssd_items["planes"] == session.plan.num_slots * session.plan.slot_layout.num_bytes


@pytest.mark.usefixtures("share")
def test_gradients_that_wait_on_ssd_are_not_updated_early(ssd_dir: Path) -> None:
    with open_speculative(ssd_dir, placement=LATE_AMONG_EARLY) as session:
        session.prepare(4, 16)
        names = {session.plan.spec.units[u].name for u in session.plan.early}
    assert names == {"block.3", "block.1", "block.0"}


def test_memory_that_is_short_leaves_fewer_units_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second planes are far smaller than what a heap varies by, as a whole and in the trial of a
    # block.
    try_out = prepare.try_out
    monkeypatch.setattr(prepare, "_held_bytes", lambda: 1 << 30)
    monkeypatch.setattr(prepare, "try_out", lambda *args, **options: replace(try_out(*args, **options), workspace_bytes=0))
    with open_speculative(None, tier="dram") as session:
        session.prepare(4, 16)
        second, needed = session.plan.dram_items["second planes of early updates"], session.plan.dram_bytes
    with open_speculative(None, tier="dram", dram=needed - second // 2) as session:
        session.prepare(4, 16)
        assert 0 < len(session.plan.early) < 5
    with pytest.raises(RatelError, match="dram: .*short by"):
        with open_speculative(None, tier="dram", dram=needed - second) as session:
            session.prepare(4, 16)


def test_every_family_can(guess: Callable, share: Callable, ssd_dir: Path) -> None:
    for family in CAUSAL:
        expected = run(ssd_dir, family, optimizer="deferred", tier="dram", max_grad_norm=1.0, steps=2)
        assert_same_steps(run(ssd_dir, family, max_grad_norm=1.0, placement=MIXED, steps=2), expected)


# --- steps that break off ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("guess", "share")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", [(VerticalStep, "_turn"), (VerticalStep, "_backward_pre"), (Gradients, "total_norm"),
                                   (OptimizerPipeline, "decide")], ids=lambda where: where[1])
@pytest.mark.parametrize("place", ["dram", "ssd, one of each buffer"])
def test_a_step_that_breaks_off_ends_the_session(place: str, where: tuple[type, str], error: type[BaseException], ssd_dir: Path,
                                                 tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anywhere between asking for early updates and deciding about them: nothing waits for a
    decision that never comes, and no later step is made on states that nobody knows. A commit is
    being made meanwhile."""
    before, (one, other) = set(threading.enumerate()), batches("llama", 2)

    def broken(*_: Any) -> None:
        raise error("broken off")

    with within(), jitter.injected(0.002, seed=0):
        session = open_speculative(ssd_dir, max_grad_norm=NEVER, durable="step", commits=tmp_path / "commits", **PLACES[place])
        session.step(one)
        session.commit()
        monkeypatch.setattr(*where, broken)
        with pytest.raises(error, match="broken off"):
            session.step(other)
        with pytest.raises(RatelError, match="ended with an earlier error"):
            session.step(other)
        session.close()
    assert set(threading.enumerate()) == before


def test_an_interrupt_before_a_step_is_counted_ends_the_session_too(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next step would have its number, and its correction of the moments' bias."""
    class Interrupts:
        @property
        def applied(self) -> bool:
            raise KeyboardInterrupt("not counted")

    step, (one, other) = Training.step, batches("llama", 2)
    with open_speculative(ssd_dir, max_grad_norm=NEVER, tier="dram") as session:
        session.step(one)
        monkeypatch.setattr(Training, "step", lambda *args, **more: [step(*args, **more), Interrupts()][1])
        with pytest.raises(KeyboardInterrupt, match="not counted"):
            session.step(other)
        with pytest.raises(RatelError, match="ended with an earlier error"):
            session.step(other)
