"""Updates made before the norm is known: kept, made again or forgotten, they lead to the bits of
deferred ones.

Steps are made to guess wrongly on purpose: what a guess is based on is replaced by what the test
wants.
"""

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ratel.errors import RatelError
from ratel.memory import jitter
from ratel.planner.schedule import Gather
from ratel.planner.work import Buffers
from ratel.runtime.planning import prepare
from ratel.runtime.session.training_step import REMEMBERED_STEPS, Training, expects_no_scaling
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
from tests.support.sessions import MANY, MIXED, SMALL, everything, with_frozen
from tests.support.speculative import (ALWAYS, LATE_AMONG_EARLY, MODES, NEVER, PLACES, STEPS, guess, open_speculative, run,
                                       share)  # noqa: F401

pytestmark = pytest.mark.numerics


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
