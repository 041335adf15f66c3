"""Weights from every kind of source arrive in the units bit for bit, and come back out."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ratel.models import Parts, load
from ratel.planner.shape import UnitSpec
from tests.support.models import CPU, FAMILIES, configs, make_model, named

pytestmark = pytest.mark.numerics


def read_all(parts: Parts) -> dict[str, torch.Tensor]:
    """Every parameter of every unit, unused ones included; checks that padding is zero."""
    parts.stored.check_source()
    found: dict[str, torch.Tensor] = {}
    for unit in (*parts.spec.units, *([parts.unused] if parts.unused else [])):
        flat = torch.full((unit.num_elements,), 7.0)
        parts.stored.read_unit(unit, flat)
        rest = flat.clone()
        for p in unit.params:
            found[p.name] = flat[p.offset:p.end].view(p.shape)
            rest[p.offset:p.end] = 0
        assert not rest.any(), "padding must be zero"
    return found


def assert_weights(found: dict[str, torch.Tensor], model: nn.Module) -> None:
    expected = {name: p.detach().float() for name, p in model.named_parameters()}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def open_directory(path: Path) -> Parts:
    return load(str(path), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_written_by_transformers(family: str, tmp_path: Path) -> None:
    model = make_model(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_weights(read_all(open_directory(tmp_path)), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_sharded_directory(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("llama").to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_weights(read_all(open_directory(tmp_path)), model)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_fused_experts_under_the_names_of_the_module(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.config.save_pretrained(tmp_path)
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, tmp_path / "model.safetensors")
    assert_weights(read_all(open_directory(tmp_path)), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_what_transformers_loads_and_writes(family: str, tmp_path: Path) -> None:
    import transformers

    from ratel.runtime.states.export import export_model

    model = make_model(family)
    expected = copy.deepcopy(model)
    parts = load(model, dtype=torch.bfloat16, device=CPU)

    def weights(unit: UnitSpec) -> list[tuple[int, torch.Tensor]]:
        flat = torch.empty(unit.num_elements)
        parts.stored.read_unit(unit, flat)
        return [(begin, flat[begin : begin + 1000]) for begin in range(0, unit.num_elements, 1000)]

    export_model(parts, weights, tmp_path / "out", torch.float32)
    parts.close()
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is type(expected) and loaded.dtype is torch.float32
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    expected.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_the_base_model_gets_its_prefix(tmp_path: Path) -> None:
    model = make_model("qwen3")  # tied: the base model holds every weight
    model.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
    assert_weights(read_all(open_directory(tmp_path)), model)


def test_tied_weights_may_be_stored_under_the_other_name(tmp_path: Path) -> None:
    model = make_model("qwen3")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert_weights(read_all(open_directory(tmp_path)), model)


# --- modules in memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_module_gives_its_weights_and_gets_trained_ones_back(family: str) -> None:
    model = make_model(family).to(torch.bfloat16).eval()
    before = copy.deepcopy(model)
    held = dict(model.named_parameters())
    parts = load(model, dtype=torch.float32, device=CPU)
    assert all(p.untyped_storage().nbytes() <= 8 for p in model.parameters())
    assert_weights(read_all(parts), before)

    def trained(unit: UnitSpec) -> torch.Tensor:
        flat = torch.empty(unit.num_elements)
        parts.stored.read_unit(unit.index, flat)
        return flat + 1

    parts.stored.restore(trained)
    parts.close()
    assert not model.training and {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in held.items()}
    for (name, param), old in zip(model.named_parameters(), before.parameters()):
        assert param.dtype is torch.bfloat16 and torch.equal(param, (old.float() + 1).bfloat16()), name
    batch = torch.randint(3, 90, (1, 5))
    assert not torch.equal(model(batch).logits, before(batch).logits)


def test_closing_without_restoring_leaves_the_module_as_it_was() -> None:
    model = make_model("gemma3")
    before = copy.deepcopy(model)
    model.model.embed_tokens.weight.requires_grad_(False)
    parts = load(model, dtype=torch.bfloat16, device=CPU)
    parts.close()
    assert not model.model.embed_tokens.weight.requires_grad and model.model.norm.weight.requires_grad
    for (name, tensor), (_, old) in zip(model.state_dict().items(), before.state_dict().items()):
        assert tensor.dtype is old.dtype and torch.equal(tensor, old), name
    for (name, buffer), (_, old) in zip(model.named_buffers(), before.named_buffers()):
        assert buffer.dtype is old.dtype and torch.equal(buffer, old), name
    assert "forward" not in vars(model.model.layers[0])


# --- fresh weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_follow_the_model_and_the_seed(family: str) -> None:
    def fresh(seed: int) -> tuple[Parts, dict[str, torch.Tensor]]:
        state = torch.get_rng_state()
        parts = load(configs()[family](), dtype=torch.bfloat16, device=CPU, seed=seed)
        found = read_all(parts)
        assert torch.equal(torch.get_rng_state(), state)
        return parts, {name: tensor.clone() for name, tensor in found.items()}

    import transformers

    parts, first = fresh(3)
    unit = parts.spec.units[1]
    alone = torch.empty(unit.num_elements)
    load(configs()[family](), dtype=torch.float32, device=CPU, seed=3).stored.read_unit(1, alone)
    assert torch.equal(named(parts, [alone] * len(parts.spec.units))[unit.params[0].name], first[unit.params[0].name])
    other = fresh(4)[1]
    plain = transformers.AutoModelForCausalLM.from_config(configs()[family]())
    differing = 0
    for name, param in plain.named_parameters():
        assert abs(first[name].std(correction=0) - param.std(correction=0)) < 0.01, name
        assert abs(first[name].mean() - param.mean()) < 0.01, name
        differing += not torch.equal(first[name], other[name])
        assert torch.equal(first[name], other[name]) == (param.std(correction=0) == 0), name
    assert differing > 10


def test_a_plain_module_on_meta_is_initialised_by_reset_parameters() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(3)))
    parts = load(model, dtype=torch.float32, device=CPU, loss_fn=lambda m, x: m(x).square().mean())
    parts.probe(torch.randn(2, 8))
    found = read_all(parts)
    assert torch.equal(found["0.1.weight"], torch.ones(8))
    assert 0 < found["1.0.weight"].abs().max() <= 8 ** -0.5
    assert not torch.equal(found["1.0.weight"], found["2.0.weight"])
