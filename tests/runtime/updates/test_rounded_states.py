"""Sessions whose moments are bf16 or have 8 bits: one result wherever states are and however a run is cut, equal
to an ordinary run in memory that rounds its moments by the same draws, and states that go from one
format to the other."""

import json
import logging
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ratel
from ratel.memory import jitter
from ratel.native import op_ds
from ratel.optimizer_state import load_adamw_state
from ratel.planner.formats import FORMATS
from ratel.planner.work import Buffers
from ratel.runtime.session.build import own_files
from ratel.runtime.states.saved_state import SavedState
from ratel.store.encodings import DTYPES, store_fp32, to_fp32
from tests.op_ds.test_8bit_moments import decoded, encoded
from tests.op_ds.test_bf16_moments import defined_draws, rounded
from tests.optimizer_state.states import DECAY, LR, Plain
from tests.runtime.streams.test_placement import DEVICES, VARIANTS, run
from tests.support.families import ROWS, Reference, batches, build, llama
from tests.support.sessions import MIXED, SMALL, assert_same, everything, open_session, with_frozen
from tests.support.speculative import NEVER, PLACES, guess, share  # noqa: F401
from tests.support.speculative import run as run_speculatively

pytestmark = pytest.mark.numerics
STEPS = 6
ROUNDED = [name for name in FORMATS if name != "exact"]
of_each = pytest.mark.parametrize("states", ROUNDED)


# --- against a run in memory ------------------------------------------------------------------------------------------


def round_moments(reference: Reference, units: Any, states: str, step: int, seed: int) -> None:
    """What becomes of a moment between two steps, by docs/optimizer.md."""
    for unit in units:
        noise = defined_draws(op_ds.rounding_key(seed, step, unit.index), 0, unit.num_trainable)
        flat = {name: torch.zeros(unit.num_trainable) for name in MOMENTS}
        own = [(p, reference.optimizer.state[reference.masters[p.name]]) for p in unit.params if p.trainable]
        for param, state in own:
            for name, values in flat.items():
                values[param.offset : param.end] = state[name].flatten()
        for name, values in zip(flat, as_stored(states, *flat.values(), noise)):
            for param, state in own:
                state[name].copy_(values[param.offset : param.end].view(param.shape))


MOMENTS = ("exp_avg", "exp_avg_sq")


def as_stored(states: str, m: torch.Tensor, v: torch.Tensor, noise: np.ndarray) -> list[torch.Tensor]:
    if states == "bf16":
        return [rounded(m, noise & np.uint32(0xffff)).float(), rounded(v, noise >> np.uint32(16)).float()]
    return list(map(torch.from_numpy, decoded(*encoded(m.numpy(), v.numpy(), noise))))


def numbers(plane: torch.Tensor, states: str, name: str) -> torch.Tensor:
    """A moment in fp32."""
    return to_fp32(plane, FORMATS[states]["bf16"].encoding(name))


@of_each
@pytest.mark.parametrize("family", ["llama", "gpt2", "patches"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_equals_torch_with_rounded_moments(dtype: str, family: str, states: str, ssd_dir: Path) -> None:
    seed = 11
    reference = Reference(family, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16, clip=0.5, lr=LR,
                          weight_decay=DECAY, micro_rows=ROWS)
    with open_session(ssd_dir, family, dtype=dtype, seed=seed, lr=LR, weight_decay=DECAY, max_grad_norm=0.5, tier="ssd",
                      micro_batch=ROWS, states=states) as session:
        for step, batch in enumerate(batches(family, STEPS), start=1):
            loss, _ = reference.step(batch)
            assert session.step(batch).loss == pytest.approx(loss, rel=1e-5)
            round_moments(reference, session.plan.spec.units, states, step, seed)
        weights = session.state_dict()
        assert all(torch.equal(weights[name], master.detach()) for name, master in reference.masters.items())
        for unit in session.plan.spec.units:
            for plane, moment in zip("mv", MOMENTS):
                found = numbers(session.read_state(unit, plane), states, plane)
                for p in unit.params:
                    expected = reference.optimizer.state[reference.masters[p.name]][moment]
                    assert torch.equal(found[p.offset : p.end].view(p.shape), expected), (p.name, plane)


# --- wherever states are, however the run is cut ----------------------------------------------------------------------


@of_each
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_every_placement_gives_the_same_bits(family: str, device: str, states: str, ssd_dir: Path) -> None:
    expected = run(family, ssd_dir, device, tier="dram", states=states)
    variants = VARIANTS if family == "llama" else {name: VARIANTS[name] for name in ("gpu", "ssd", "mixed, one of each buffer")}
    for options in variants.values():
        assert_same(run(family, ssd_dir, device, **options, states=states), expected)
    exact = run(family, ssd_dir, device, tier="dram")
    assert any(not torch.equal(exact[1][name], expected[1][name]) for name in exact[1])


def wide() -> torch.nn.Module:
    """Blocks of several chunks whose 8-bit moments begin at whole pages."""
    torch.manual_seed(0)
    return llama(hidden_size=256, intermediate_size=512, num_hidden_layers=2)


@of_each
def test_chunks_of_any_size_give_the_same_bits(states: str, ssd_dir: Path) -> None:
    results = []
    for options in (dict(tier="dram"), dict(tier="ssd", buffers=Buffers(chunk_elements=1 << 17)),
                    dict(tier="ssd", buffers=Buffers(chunk_elements=6144)), dict(placement={"*": "dram", "block.1": {"v": "ssd"}})):
        with jitter.injected(0.002, seed=1), open_session(ssd_dir, model=wide(), states=states, **options) as session:
            outs = [(out.loss, out.grad_norm) for out in map(session.step, batches("llama", 2))]
            results.append((outs, everything(session)))
            unit = session.plan.spec.units[1]
            assert options == dict(tier="dram") or "placement" in options or unit.num_trainable > 2 * session.plan.chunk_of(unit)
    for found in results[1:]:
        assert_same(found, results[0])


@of_each
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_modes_and_delays_give_the_same_bits(dtype: str, states: str, ssd_dir: Path) -> None:
    expected = run("llama", ssd_dir, "cpu", tier="dram", clip=0, optimizer="deferred", dtype=dtype, states=states)
    for tier in ("gpu", "dram", "ssd"):
        assert_same(run("llama", ssd_dir, "cpu", tier=tier, clip=0, optimizer="eager", dtype=dtype, delay_s=0.002,
                        buffers=SMALL, states=states), expected)


@of_each
@pytest.mark.usefixtures("guess", "share")
@pytest.mark.parametrize("place", ["dram", "ssd", "mixed"])
@pytest.mark.parametrize("clip", [NEVER, 1.53])
def test_speculative_updates_give_the_same_bits(clip: float, place: str, states: str, ssd_dir: Path) -> None:
    """What is made again is drawn again: a repeated update is the same update."""
    expected = run_speculatively(ssd_dir, optimizer="deferred", tier="dram", max_grad_norm=clip, states=states)
    found = run_speculatively(ssd_dir, max_grad_norm=clip, **PLACES[place], states=states)
    assert [name for name in expected[1] if not torch.equal(found[1][name], expected[1][name])] == []
    assert any(out.early_units for out in found[0]) and any(out.redone_units for out in found[0]) == (clip != NEVER)


def test_seeds_draw_differently(ssd_dir: Path) -> None:
    moments = {}
    for seed in (0, 1):
        with open_session(ssd_dir, seed=seed, states="bf16") as session:
            session.step(batches("llama", 1)[0])
            moments[seed] = session.read_state(session.plan.spec.units[1], "m")
    assert not torch.equal(moments[0], moments[1])
    torch.testing.assert_close(moments[0], moments[1], rtol=2**-7, atol=0)


@of_each
@pytest.mark.parametrize("kind", ["copy", "commit"])
def test_a_run_goes_on_from_any_step(kind: str, states: str, ssd_dir: Path, tmp_path: Path) -> None:
    data = batches("llama", STEPS)
    options = dict(optimizer="deferred", weight_decay=0.1, max_grad_norm=0.5, states=states)
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


def test_a_state_says_its_formats_and_takes_their_bytes(ssd_dir: Path, tmp_path: Path) -> None:
    sizes = {}
    for states in FORMATS:
        path, planes = saved(tmp_path / states, ssd_dir, states)
        manifest, state = json.loads((path / "manifest.json").read_bytes()), SavedState(path)
        sizes[states] = state.num_bytes / sum(planes[name].numel() for name in planes if name.endswith(".hi"))
        assert (manifest["version"], manifest.get("formats")) == ((3, None) if states == "exact" else (5, states))
        assert all(torch.equal(state.read(unit, plane), planes[f"{manifest['model']['units'][unit]['name']}.{plane}"])
                   for unit, plane in state.planes())
    assert sizes == {"exact": 12, "bf16": 8, "8bit": 6.0625}


LOST = "what is rounded off is lost"


def converted(plane: torch.Tensor, before: str, after: str, name: str) -> torch.Tensor:
    """Rounded to nearest, whole units at once."""
    if name in ("hi", "lo"):
        return plane
    encoding, values = FORMATS[after]["bf16"].encoding(name), numbers(plane, before, name)
    out = torch.empty(encoding.place(len(values)), dtype=DTYPES[encoding.name])
    store_fp32(values, encoding, out)
    return out


@pytest.mark.parametrize("kind", ["copy", "commits"])
def test_a_state_goes_on_in_another_format_and_says_what_is_lost(kind: str, ssd_dir: Path, tmp_path: Path,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    paths, planes = {}, {}
    for states in FORMATS:
        paths[states], planes[states] = saved(tmp_path / states, ssd_dir, states)
    with caplog.at_level(logging.WARNING, "ratel"):
        for before, after, words in [(before, after, LOST if after != "exact" else "no bit is lost")
                                     for before, after in permutations(FORMATS, 2)]:
            more = dict(durable="step", commits=tmp_path / f"{before}-on", tier="ssd") if kind == "commits" else dict(tier="dram")
            with open_session(ssd_dir, states=after, **more) as session:
                session.load(paths[before])
                session.prepare(ROWS, 16)
                found = everything(session)
                session.step(batches("llama", 1)[0])
            for name, plane in planes[before].items():
                assert torch.equal(found[name], converted(plane, before, after, name.rpartition(".")[2])), name
            assert words in caplog.text and f"from {before}" in caplog.text and f"as {after}" in caplog.text
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
        before, was = everything(session), "exact"
    for states in ("bf16", "8bit", "exact", "8bit"):
        state = SavedState(tmp_path / "commits")
        for asked, tables in FORMATS.items():
            free = tuple(state.files) if asked == was else ()
            assert own_files(state, tmp_path / "commits", tables["bf16"]) == free, "they stay until the first commit"
        with open_session(ssd_dir, states=states, **options) as session:
            session.load(tmp_path / "commits")
            session.prepare(ROWS, 16)
            for name, plane in everything(session).items():
                assert torch.equal(plane, converted(before[name], was, states, name.rpartition(".")[2]))
            session.step(data[1])
            session.commit()
            session.wait_saved()
            before, was = everything(session), states
        assert SavedState(tmp_path / "commits").manifest.get("formats", "exact") == states


@of_each
def test_moments_go_to_torch_and_come_from_it(states: str, ssd_dir: Path, tmp_path: Path) -> None:
    """Exported ones are fp32 with the stored values; imported ones are rounded to nearest."""
    with open_session(ssd_dir, dtype="fp32", states=states) as session:
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
            for plane, name in zip("mv", MOMENTS):
                stored = numbers(planes[f"{unit.name}.{plane}"], states, plane)[param.offset : param.end].view(param.shape)
                assert torch.equal(state[name], stored) and state["step"] == 2 and stored.any()
    plain = Plain("llama").run("llama", 0, 2)
    ratel.save_adamw_state(tmp_path / "plain", plain.model, plain.optimizer)
    with open_session(ssd_dir, model=plain.model, dtype="fp32", optimizer_state=tmp_path / "plain", states=states) as session:
        session.prepare(ROWS, 16)
        for unit in session.plan.spec.units:
            exact = torch.zeros(unit.num_trainable)
            for param in unit.params:
                exact[param.offset : param.end] = plain.optimizer.state[plain.masters[param.name]]["exp_avg_sq"].flatten()
            assert torch.equal(session.read_state(unit, "v"), converted(exact, "exact", states, "v"))


@of_each
def test_what_is_frozen_stays_what_it_is(states: str, ssd_dir: Path, tmp_path: Path) -> None:
    results = []
    for place in (dict(tier="dram"), dict(tier="ssd"), dict(placement=MIXED)):
        with open_session(ssd_dir, model=with_frozen("mlp", "embed"), **place, states=states) as session:
            for batch in batches("llama", 3):
                session.step(batch)
            results.append(everything(session))
            session.save(tmp_path / "state")
        with open_session(ssd_dir, model=with_frozen("mlp", "embed"), **place, states=states) as session:
            session.load(tmp_path / "state")
            session.prepare(ROWS, 16)
            again = everything(session)
        assert all(torch.equal(again[name], plane) for name, plane in results[-1].items())
    assert all(torch.equal(one[name], results[0][name]) for one in results for name in one)
