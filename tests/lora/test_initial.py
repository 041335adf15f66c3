"""What adapters begin with: peft's tensors where they follow from the base, its distributions where
they are drawn; the same for any order and any choice of layers."""

import math

import pytest
import torch
from torch import Tensor, nn

from ratel.lora.describe.config import LoraConfig
from ratel.lora.describe.layers import AdaptedLayer
from ratel.lora.describe.outline import EMBEDDING, outline_of
from ratel.lora.describe.peft_config import of_object
from ratel.lora.describe.targets import Targets, resolve
from ratel.lora.files import named
from ratel.lora.values.initial import initial, needs_weight, residual
from tests.support.lora import logits, make, peft_model, peft_tensors

pytestmark = pytest.mark.numerics
peft = pytest.importorskip("peft", minversion="0.21")


def begin(targets: Targets, model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    weights = dict(model.named_parameters())
    return {name: values for layer in targets.layers if layer.tied_to is None for name, values in named(
        layer, initial(layer, targets.effective, seed, weights[layer.weight].data if needs_weight(layer, targets.effective) else None)).items()}


def layer_of(name: str, **settings: object) -> tuple[AdaptedLayer, LoraConfig]:
    config = LoraConfig(rank=16, **settings)
    return next(layer for layer in resolve(config, outline_of(make(name))).layers), config


@pytest.mark.parametrize("name", ("llama", "gpt_oss"))
def test_what_is_drawn_has_pefts_distribution(name: str) -> None:
    """Compared by spread and limits: the draws themselves are ours."""
    for init in (True, "gaussian"):
        arguments = dict(r=16, init_lora_weights=init, target_modules=["q_proj", "embed_tokens"],
                         target_parameters=["experts.gate_up_proj"] if name == "gpt_oss" else None)
        model = make(name)
        targets = resolve(of_object(peft.LoraConfig(**arguments)), outline_of(model))
        ours, theirs = begin(targets, model), peft_tensors(peft_model(model, peft.LoraConfig(**arguments)))
        assert ours.keys() == theirs.keys()
        for key, values in ours.items():
            assert values.dtype == torch.float32
            if not theirs[key].any():
                assert not values.any(), key
                continue
            assert values.std().item() == pytest.approx(theirs[key].std().item(), rel=0.1) and abs(values.mean().item()) < 0.3 * values.std().item()
            if init is True and "embedding" not in key:
                limit = 1 / math.sqrt(values.shape[1])
                assert 0.97 * limit < values.abs().max().item() <= limit


def test_a_seed_and_a_name_give_a_tensor() -> None:
    model = make("llama")
    every = begin(resolve(LoraConfig(rank=4), outline_of(model)), model)
    torch.manual_seed(99)
    some = begin(resolve(LoraConfig(rank=4, targets=("v_proj", "k_proj")), outline_of(model)), model)
    after = torch.rand(1)
    torch.manual_seed(99)
    assert torch.equal(after, torch.rand(1)), "nobody else's numbers are drawn from"
    assert len(some) == 8 and all(torch.equal(values, every[key]) for key, values in some.items())
    drawn = [values for key, values in every.items() if "lora_A" in key]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i] if a.shape == b.shape)
    other = begin(resolve(LoraConfig(rank=4), outline_of(model)), model, seed=1)
    assert all(not torch.equal(other[key], every[key]) for key in every if "lora_A" in key)


@pytest.mark.parametrize("name", ("llama", "gpt2"))
@pytest.mark.parametrize("init", ("pissa", "olora"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_the_base_gives_is_what_it_gives_peft(name: str, init: str, dtype: torch.dtype) -> None:
    """Bitwise, and so is what is left of the base."""
    if (name, init) == ("gpt2", "olora"):
        pytest.skip("peft's olora takes a Conv1D for a Linear; tested against the definition below")
    given = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=init)
    model = make(name, dtype)
    targets = resolve(of_object(given), outline_of(model))
    before = {key: values.detach().clone() for key, values in model.named_parameters()}
    ours = begin(targets, model)
    theirs = peft_model(model, given)
    stored = peft_tensors(theirs)
    assert all(torch.equal(ours[key], values.float()) or dtype != torch.float32 and torch.equal(ours[key].to(dtype), values.to(dtype))
               for key, values in stored.items()) and ours.keys() == stored.keys()
    for layer in targets.layers:
        left = residual(layer, before[layer.weight], ours[layer.a_name], ours[layer.b_name])
        assert left.dtype == dtype
        assert torch.equal(left, theirs.base_model.model.get_submodule(layer.name).base_layer.weight)


@pytest.mark.parametrize("name", ("llama", "gpt2"))
@pytest.mark.parametrize("init", ("pissa", "olora"))
def test_the_base_goes_on_as_it_was(name: str, init: str) -> None:
    model = make(name)
    targets = resolve(LoraConfig(rank=4, alpha=6, init=init), outline_of(model))
    weights = dict(model.named_parameters())
    for layer in targets.layers:
        a, b = (lambda found: (found.a, found.b))(initial(layer, targets.effective, 0, weights[layer.weight].data))
        left = residual(layer, weights[layer.weight].data, a, b)
        whole = left + layer.scale * ((b @ a).t() if layer.is_transposed else b @ a)
        torch.testing.assert_close(whole, weights[layer.weight].data, rtol=0, atol=2e-6)
        matrix = weights[layer.weight].data.t() if layer.is_transposed else weights[layer.weight].data
        if init == "pissa":
            share = torch.linalg.svdvals(layer.scale * b @ a)[:4]
            torch.testing.assert_close(share, torch.linalg.svdvals(matrix)[:4], rtol=1e-5, atol=0)
        else:
            torch.testing.assert_close(b.t() @ b, torch.eye(4), rtol=0, atol=1e-5)
            torch.testing.assert_close(b @ a, b @ b.t() @ matrix, rtol=0, atol=1e-5)


def test_an_approximate_pissa_has_a_seed() -> None:
    """And finds what the exact one finds, where there is something to find."""
    layer, config = layer_of("llama", init="pissa_niter_4")
    noise = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.linalg.qr(noise[0]).Q @ torch.diag(0.5 ** torch.arange(32.0)) @ torch.linalg.qr(noise[1]).Q
    found, exact = (initial(layer, LoraConfig(rank=16, init=init), 0, weight) for init in ("pissa_niter_4", "pissa"))
    torch.testing.assert_close(found.b @ found.a, exact.b @ exact.a, rtol=0, atol=1e-5)
    weight, state = noise[0], torch.get_rng_state()
    first, again, other = (initial(layer, config, seed, weight).a for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's numbers are drawn from"


@pytest.mark.parametrize("name", ("llama", "gpt2"))
@pytest.mark.parametrize("init", (True, "pissa"))
def test_magnitudes_are_pefts(name: str, init: bool | str) -> None:
    given = peft.LoraConfig(r=4, use_dora=True, init_lora_weights=init,
                            target_modules=["c_attn", "wte"] if name == "gpt2" else ["q_proj", "down_proj", "embed_tokens"])
    model = make(name)
    targets = resolve(of_object(given), outline_of(model))
    ours, theirs = begin(targets, model), peft_tensors(peft_model(model, given))
    for layer in targets.layers:
        if layer.kind == EMBEDDING or init is True:
            assert torch.equal(ours[layer.magnitude_name], theirs[layer.magnitude_name])
        else:
            torch.testing.assert_close(ours[layer.magnitude_name], theirs[layer.magnitude_name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_an_adapter_begins_as_the_base(name: str) -> None:
    """Step 0, DoRA included, in peft's own forward pass."""
    for dora in (False, True):
        model = make(name)
        before = logits(model)
        config = peft.LoraConfig(r=4, use_dora=dora, target_modules="all-linear")
        tensors = begin(resolve(of_object(config), outline_of(model)), model)
        adapted = peft_model(model, config)
        found = peft.set_peft_model_state_dict(adapted, tensors)
        assert not found.unexpected_keys and not [key for key in found.missing_keys if "lora_" in key]
        torch.testing.assert_close(logits(adapted), before, rtol=0, atol=2e-6 if dora else 0)
