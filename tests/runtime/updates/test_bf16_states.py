"""Sessions whose moments are bf16: one result wherever states are and however a run is cut, equal
to an ordinary run in memory that rounds its moments by the same draws, and states that go from one
format to the other."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ratel
from ratel.native import op_ds
from ratel.optimizer_state import load_adamw_state
from ratel.planner.formats import FORMATS
from ratel.runtime.states.saved_state import SavedState
from ratel.runtime.updates.arithmetic import UPDATES
from tests.op_ds.test_bf16_moments import defined_draws, rounded
from tests.optimizer_state.states import DECAY, LR, Plain
from tests.runtime.streams.test_placement import DEVICES, VARIANTS, run
from tests.support.speculative import NEVER, PLACES, guess, share  # noqa: F401
from tests.support.speculative import run as run_speculatively
from tests.support.families import ROWS, Reference, batches, build
from tests.support.sessions import MIXED, SMALL, assert_same, everything, open_session, with_frozen

pytestmark = pytest.mark.numerics
STEPS = 6
BF16 = dict(states="bf16")


# --- against a run in memory ------------------------------------------------------------------------------------------


def round_moments(reference: Reference, units: Any, step: int, seed: int) -> None:
    """What becomes of a moment between two steps, by docs/optimizer.md."""
    for unit in units:
        noise = defined_draws(op_ds.rounding_key(seed, step, unit.index), 0, unit.num_trainable)
        for param in (p for p in unit.params if p.trainable):
            state = reference.optimizer.state[reference.masters[param.name]]
            for name, part in (("exp_avg", noise & np.uint32(0xffff)), ("exp_avg_sq", noise >> np.uint32(16))):
                state[name].copy_(rounded(state[name].flatten(), part[param.offset : param.end]).float().view(param.shape))


@pytest.mark.parametrize("family", ["llama", "gpt2", "patches"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_equals_torch_with_rounded_moments(dtype: str, family: str, ssd_dir: Path) -> None:
    seed = 11
    reference = Reference(family, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16, clip=0.5, lr=LR,
                          weight_decay=DECAY, micro_rows=ROWS)
    with open_session(ssd_dir, family, dtype=dtype, seed=seed, lr=LR, weight_decay=DECAY, max_grad_norm=0.5, tier="ssd",
                      micro_batch=ROWS, **BF16) as session:
        for step, batch in enumerate(batches(family, STEPS), start=1):
            loss, _ = reference.step(batch)
            assert session.step(batch).loss == pytest.approx(loss, rel=1e-5)
            round_moments(reference, session.plan.spec.units, step, seed)
        weights = session.state_dict()
        assert all(torch.equal(weights[name], master.detach()) for name, master in reference.masters.items())
        for unit in session.plan.spec.units:
            for plane, moment in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                found = session.read_state(unit, plane)
                assert found.dtype is torch.bfloat16
                for p in unit.params:
                    expected = reference.optimizer.state[reference.masters[p.name]][moment]
                    assert torch.equal(found[p.offset : p.end].float().view(p.shape), expected), (p.name, plane)


# --- wherever states are, however the run is cut ----------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_every_placement_gives_the_same_bits(family: str, device: str, ssd_dir: Path) -> None:
    expected = run(family, ssd_dir, device, tier="dram", **BF16)
    variants = VARIANTS if family == "llama" else {name: VARIANTS[name] for name in ("gpu", "ssd", "mixed, one of each buffer")}
    for options in variants.values():
        assert_same(run(family, ssd_dir, device, **options, **BF16), expected)
    exact = run(family, ssd_dir, device, tier="dram")
    assert any(not torch.equal(exact[1][name].float(), expected[1][name].float()) for name in exact[1])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_modes_and_delays_give_the_same_bits(dtype: str, ssd_dir: Path) -> None:
    expected = run("llama", ssd_dir, "cpu", tier="dram", clip=0, optimizer="deferred", dtype=dtype, **BF16)
    for tier in ("gpu", "dram", "ssd"):
        assert_same(run("llama", ssd_dir, "cpu", tier=tier, clip=0, optimizer="eager", dtype=dtype, delay_s=0.002,
                        buffers=SMALL, **BF16), expected)


@pytest.mark.usefixtures("guess", "share")
@pytest.mark.parametrize("place", ["dram", "ssd", "mixed"])
@pytest.mark.parametrize("clip", [NEVER, 1.53])
def test_speculative_updates_give_the_same_bits(clip: float, place: str, ssd_dir: Path) -> None:
    """What is made again is drawn again: a repeated update is the same update."""
    expected = run_speculatively(ssd_dir, optimizer="deferred", tier="dram", max_grad_norm=clip, **BF16)
    found = run_speculatively(ssd_dir, max_grad_norm=clip, **PLACES[place], **BF16)
    assert [name for name in expected[1] if not torch.equal(found[1][name], expected[1][name])] == []
    assert any(out.early_units for out in found[0]) and any(out.redone_units for out in found[0]) == (clip != NEVER)


def test_seeds_draw_differently(ssd_dir: Path) -> None:
    moments = {}
    for seed in (0, 1):
        with open_session(ssd_dir, seed=seed, **BF16) as session:
            session.step(batches("llama", 1)[0])
            moments[seed] = session.read_state(session.plan.spec.units[1], "m")
    assert not torch.equal(moments[0], moments[1])
    torch.testing.assert_close(moments[0], moments[1], rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", ["copy", "commit"])
def test_a_run_goes_on_from_any_step(kind: str, ssd_dir: Path, tmp_path: Path) -> None:
    data = batches("llama", STEPS)
    options = dict(optimizer="deferred", weight_decay=0.1, max_grad_norm=0.5, **BF16)
    with open_session(ssd_dir, tier="dram", **options) as session:
        for batch in data:
            session.step(batch)
        expected = everything(session)
    place = dict(durable="step", placement=MIXED) if kind == "commit" else dict(tier="ssd")
    for begin in range(STEPS):
        commits = tmp_path / f"{kind}-{begin}"
        more = dict(commits=commits) if kind == "commit" else {}
        with open_session(ssd_dir, **place, **more, **options) as session:
            if begin:
                session.load(tmp_path / f"{kind}-{begin - 1}")
            session.step(data[begin])
            session.commit() if kind == "commit" else session.save(commits)
            found = everything(session)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# --- states and formats -----------------------------------------------------------------------------------------------


def saved(path: Path, ssd: Path, states: str, steps: int = 3, **options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    with open_session(ssd, states=states, tier="ssd", **options) as session:
        for batch in batches("llama", steps):
            session.step(batch)
        session.save(path)
        return path, everything(session)


def test_a_state_says_its_formats_and_takes_8_bytes_a_parameter(ssd_dir: Path, tmp_path: Path) -> None:
    sizes = {}
    for states in FORMATS:
        path, planes = saved(tmp_path / states, ssd_dir, states)
        manifest, state = json.loads((path / "manifest.json").read_bytes()), SavedState(path)
        sizes[states] = state.num_bytes / sum(planes[name].numel() for name in planes if name.endswith(".hi"))
        assert (manifest["version"], manifest.get("formats")) == ((3, None) if states == "exact" else (5, states))
        assert all(torch.equal(state.read(unit, plane), planes[f"{manifest['model']['units'][unit]['name']}.{plane}"])
                   for unit, plane in state.planes())
    assert sizes == {"exact": 12, "bf16": 8}


@pytest.mark.parametrize("kind", ["copy", "commits"])
def test_a_state_goes_on_in_another_format_and_says_what_is_lost(kind: str, ssd_dir: Path, tmp_path: Path,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    paths, planes = {}, {}
    for states in FORMATS:
        paths[states], planes[states] = saved(tmp_path / states, ssd_dir, states)
    with caplog.at_level(logging.WARNING, "ratel"):
        for before, after, words in (("exact", "bf16", "what is rounded off is lost"), ("bf16", "exact", "no bit is lost")):
            more = dict(durable="step", commits=tmp_path / f"{before}-on", tier="ssd") if kind == "commits" else dict(tier="dram")
            with open_session(ssd_dir, states=after, **more) as session:
                session.load(paths[before])
                session.prepare(ROWS, 16)
                found = everything(session)
                session.step(batches("llama", 1)[0])
            for name, plane in planes[before].items():
                wanted = plane.to(found[name].dtype) if name.endswith((".m", ".v")) else plane
                assert torch.equal(found[name], wanted) and (found[name].dtype is plane.dtype) == name.endswith(("hi", "lo"))
            assert words in caplog.text and f"from {before}" in caplog.text
            caplog.clear()
        with open_session(ssd_dir, states="bf16", tier="dram") as session:
            session.load(paths["bf16"])
            session.prepare(ROWS, 16)
    assert caplog.text == ""


def test_commits_in_place_go_on_in_another_format(ssd_dir: Path, tmp_path: Path) -> None:
    """They cannot go on in the files that they have, whose places are of other sizes."""
    options = dict(durable="step", commits=tmp_path / "commits", tier="ssd")
    data = batches("llama", 4)
    with open_session(ssd_dir, states="exact", **options) as session:
        session.step(data[0])
        session.commit()
        session.wait_saved()
        before = everything(session)
    for states in ("bf16", "exact", "bf16"):
        with open_session(ssd_dir, states=states, **options) as session:
            session.load(tmp_path / "commits")
            session.prepare(ROWS, 16)
            assert all(torch.equal(plane, before[name].to(plane.dtype)) for name, plane in everything(session).items())
            session.step(data[1])
            session.commit()
            session.wait_saved()
            before = everything(session)
        assert SavedState(tmp_path / "commits").manifest.get("formats", "exact") == states


def test_moments_go_to_torch_and_come_from_it(ssd_dir: Path, tmp_path: Path) -> None:
    """Exported ones are fp32 with the stored values; imported ones are rounded to nearest."""
    with open_session(ssd_dir, dtype="fp32", **BF16) as session:
        for batch in batches("llama", 2):
            session.step(batch)
        session.export(tmp_path / "half", dtype="fp32", optimizer=True)
        planes, units = everything(session), session.plan.spec.units
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    load_adamw_state(tmp_path / "half", model, optimizer)
    parameters = dict(model.named_parameters())
    for unit in units:
        for param in unit.params:
            state = optimizer.state[parameters[param.name]]
            for plane, name in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                stored = planes[f"{unit.name}.{plane}"][param.offset : param.end].view(param.shape)
                assert torch.equal(state[name], stored.float()) and state["step"] == 2
    plain = Plain("llama").run("llama", 0, 2)
    ratel.save_adamw_state(tmp_path / "plain", plain.model, plain.optimizer)
    with open_session(ssd_dir, model=plain.model, dtype="fp32", optimizer_state=tmp_path / "plain", **BF16) as session:
        session.prepare(ROWS, 16)
        for unit in session.plan.spec.units:
            found = session.read_state(unit, "v")
            for param in unit.params:
                exact = plain.optimizer.state[plain.masters[param.name]]["exp_avg_sq"]
                assert torch.equal(found[param.offset : param.end].view(param.shape), exact.bfloat16())


def test_what_is_frozen_stays_what_it_is(ssd_dir: Path, tmp_path: Path) -> None:
    results = []
    for place in (dict(tier="dram"), dict(tier="ssd"), dict(placement=MIXED)):
        with open_session(ssd_dir, model=with_frozen("mlp", "embed"), **place, **BF16) as session:
            for batch in batches("llama", 3):
                session.step(batch)
            results.append(everything(session))
            session.save(tmp_path / "state")
        with open_session(ssd_dir, model=with_frozen("mlp", "embed"), **place, **BF16) as session:
            session.load(tmp_path / "state")
            session.prepare(ROWS, 16)
            again = everything(session)
        assert all(torch.equal(again[name], plane) for name, plane in results[-1].items())
    assert all(torch.equal(one[name], results[0][name]) for one in results for name in one)


# --- hard cases -------------------------------------------------------------------------------------------------------


def trained(states: str, gradients: list[torch.Tensor], weights: torch.Tensor, lr: float) -> list[torch.Tensor]:
    """Masters after each of the updates, all of one vector."""
    formats, n = FORMATS[states]["fp32"], len(weights)
    kinds = {"exact": torch.float32, "bf16": torch.bfloat16}
    planes = {"hi": torch.empty(n, dtype=torch.bfloat16), "lo": torch.empty(n, dtype=torch.int16),
              "m": torch.zeros(n, dtype=kinds[states]), "v": torch.zeros(n, dtype=kinds[states])}
    masters = []
    with op_ds.Pool(2) as pool:
        pool.split(weights.data_ptr(), planes["hi"].data_ptr(), planes["lo"].data_ptr(), n)
        for step, grad in enumerate(gradients, start=1):
            given = {**planes, "g": grad}
            UPDATES[formats.update].in_memory(pool, given, given, lr=lr, beta1=0.9, beta2=0.999, eps=1e-15, step=step,
                                              rounding=op_ds.Rounding(key=op_ds.rounding_key(0, step, 0)))
            masters.append(torch.empty(n))
            pool.merge(planes["hi"].data_ptr(), planes["lo"].data_ptr(), masters[-1].data_ptr(), n)
    return masters


def moved(masters: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    return (masters[-1].double() - weights.double()).abs()


N = 4096


def directions(step: int) -> torch.Tensor:
    """A gradient with a trend in each element, and noise."""
    rng = torch.Generator().manual_seed(1000 + step)
    return torch.linspace(0.2, 2.0, N) + torch.randn(N, generator=rng)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e3])
def test_gradients_of_any_size_train_as_exact_states_do(scale: float) -> None:
    """AdamW does not see their scale; squares of tiny ones are far below what fp16 can hold."""
    weights, gradients = torch.zeros(N), [scale * directions(step) for step in range(200)]
    exact, short = (moved(trained(states, gradients, weights, 1e-3), weights) for states in FORMATS)
    assert exact.min() > 0 and (short / exact).mean().item() == pytest.approx(1, abs=0.01)
    assert ((short / exact) - 1).std() < 0.1


def test_updates_below_the_resolution_of_bf16_add_up() -> None:
    """At a learning rate of 1e-6 a weight of 1 moves by a four-thousandth of bf16's step there; the
    lower half takes it."""
    weights, gradients = torch.ones(N), [directions(step) for step in range(300)]
    masters = trained("bf16", gradients, weights, 1e-6)
    exact = moved(trained("exact", gradients, weights, 1e-6), weights)
    assert (masters[0] != 1).all() and (masters[0].bfloat16() == 1).all()
    assert (moved(masters, weights) / exact).mean().item() == pytest.approx(1, abs=0.01) and exact.mean() > 1e-4


def test_rows_that_are_seldom_touched() -> None:
    """An embedding has them: a gradient in one step of a hundred, zeros in between, in which moments
    decay and do not stay."""
    weights = torch.zeros(N)
    gradients = [directions(step) if step % 100 == 0 else torch.zeros(N) for step in range(400)]
    exact, short = (moved(trained(states, gradients, weights, 1e-3), weights) for states in FORMATS)
    assert (short / exact).mean().item() == pytest.approx(1, abs=0.02) and ((short / exact) - 1).std() < 0.15


def test_a_spike_is_forgotten_at_the_same_pace() -> None:
    """A gradient a thousand times as large as the others holds the step back for as long as the
    second moment remembers it."""
    weights = torch.zeros(N)
    gradients = [directions(step) * (1000 if step == 50 else 1) for step in range(600)]
    results = {states: trained(states, gradients, weights, 1e-3) for states in FORMATS}
    for begin, end in ((0, 49), (60, 300), (300, 599)):
        exact, short = ((masters[end] - masters[begin]).double().norm() for masters in results.values())
        assert short.item() == pytest.approx(exact.item(), rel=0.03), (begin, end)
    assert all(torch.isfinite(masters[-1]).all() for masters in results.values())
