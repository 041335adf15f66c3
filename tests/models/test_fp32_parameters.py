"""Parameters that a class keeps in fp32 (routers of experts) compute in fp32 in a bf16 run, as in
transformers: weights, gradients, updates, states, exports."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ratel.runtime.session.session import Session
from tests.models.test_loading import configs, write

pytestmark = pytest.mark.e2e

ROUTER = "model.layers.1.mlp.gate.weight"
BATCH = {"input_ids": torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(1))}


@pytest.fixture(autouse=True)
def class_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases of transformers differ in which classes do."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel

    monkeypatch.setattr(DeepseekV3PreTrainedModel, "_keep_in_fp32_modules_strict", ["e_score_correction_bias", "gate.weight"])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write(configs()["deepseek-v3"], tmp_path / "in")
    return tmp_path / "in"


def opened(model: object, **options: object) -> Session:
    return Session(model, **{**dict(dtype="bf16", device="cpu", lr=1e-3, max_grad_norm=None, micro_batch=4), **options})


def test_weights_and_gradients_are_those_of_transformers(directory: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).train()
    loss = plain(**BATCH, labels=BATCH["input_ids"], use_cache=False).loss
    loss.backward()
    assert plain.get_parameter(ROUTER).dtype is torch.float32
    with opened(directory) as session:
        assert session.step(BATCH).loss == pytest.approx(loss.item(), abs=1e-6)
        for unit in session.plan.spec.units:
            moment = session.read_state(unit, "m")  # a tenth of the first gradient
            for param in unit.params:
                expected = plain.get_parameter(param.name).grad.float() / 10
                found = moment[param.offset : param.end].view(param.shape)
                assert torch.allclose(found, expected, rtol=1e-6, atol=0), param.name
            assert unit.fp32 == (ROUTER in {p.name for p in unit.params})


def test_the_router_is_not_rounded_between_steps(directory: Path) -> None:
    """Its update is far below bf16's: a copy that computes in bf16 would not move for many
    steps."""
    with opened(directory, lr=1e-6) as session:
        session.step(BATCH)
        session.flush()
        unit = next(u for u in session.plan.spec.units if u.fp32)
        used = session._machinery.weights.resident(unit.index)
        master = session.read_master(unit)
    assert used.dtype is torch.float32 and torch.equal(used, master)
    stored = load_file(directory / "model.safetensors")[ROUTER]
    assert not torch.equal(master[: stored.numel()].view_as(stored), stored)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", [dict(tier="ssd"), dict(tier="dram"), dict(placement={"*": "ssd", "block.*": "dram"}),
                                     dict(tier="gpu"), dict(optimizer="eager"), dict(optimizer="speculative", tier="ssd")], ids=str)
def test_placement_changes_no_bit(options: dict, device: str, directory: Path, ssd_dir: Path) -> None:
    found = []
    for chosen in ({}, options):
        with opened(directory, ssd=[ssd_dir], device=device, gpu_memory="4GiB" if device == "cuda" else None, **chosen) as session:
            losses = [session.step(BATCH).loss for _ in range(3)]
            assert all(session.plan.placement(u).on_gpu for u in session.plan.spec.units if u.fp32)
            found.append((losses, session.state_dict()))
    (first, weights), (second, others) = found
    assert first == second and all(torch.equal(weights[name], others[name]) for name in weights)


def test_gradients_of_micro_batches_are_summed_in_fp32(directory: Path) -> None:
    moments = []
    for micro in (1, 4):
        with opened(directory, micro_batch=micro) as session:
            session.step(BATCH)
            unit = next(u for u in session.plan.spec.units if u.fp32)
            moments.append(session.read_state(unit, "m"))
    assert (moments[0] - moments[1]).abs().max() < 0.02 * moments[1].abs().max() and moments[0].any()


def test_a_state_continues_bit_for_bit(directory: Path, ssd_dir: Path, tmp_path: Path) -> None:
    with opened(directory) as session:
        for _ in range(2):
            session.step(BATCH)
        session.save(tmp_path / "state")
        expected = session.step(BATCH).loss
    units = json.loads((tmp_path / "state" / "manifest.json").read_text())["model"]["units"]
    assert [unit["name"] for unit in units if unit.get("fp32")] == ["block.1.fp32"]
    assert sum("fp32" in unit for unit in units) == 1, "units of other models are written as before"
    with opened(directory, ssd=[ssd_dir], tier="ssd") as session:
        session.load(tmp_path / "state")
        assert session.step(BATCH).loss == expected


def test_an_export_keeps_them_in_fp32(directory: Path, tmp_path: Path) -> None:
    with opened(directory) as session:
        session.step(BATCH)
        session.export(tmp_path / "out", dtype="bf16")
        master = session.state_dict()[ROUTER]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name, t in stored.items() if t.dtype is torch.float32} == {ROUTER, ROUTER.replace("weight", "e_score_correction_bias")}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(loaded.get_parameter(ROUTER), master)


def test_an_object_computes_as_its_directory_does(directory: Path) -> None:
    losses = []
    for model in (directory, transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16),
                  transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)):
        with opened(model) as session:
            assert sum(unit.fp32 for unit in session.parts.spec.units) == 1
            bias = session.parts.module.model.layers[1].mlp.gate.e_score_correction_bias
            assert bias.dtype is torch.float32
            losses.append([session.step(BATCH).loss for _ in range(2)])
    assert losses[0][0] == losses[1][0] == losses[2][0] and losses[0] == losses[2]


def test_in_fp32_nothing_is_apart(directory: Path) -> None:
    with opened(directory, dtype="fp32") as session:
        session.step(BATCH)
        assert not session.plan.spec.has_fp32_units
