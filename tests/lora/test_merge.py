"""Merging: peft's own rounding, bit by bit; the merged model computes what the adapted one did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.lora.describe.outline import outline_of
from ratel.lora.describe.peft_config import of_object
from ratel.lora.describe.targets import Targets, resolve
from ratel.lora.files import tensors_of
from ratel.lora.values.merge import merged, merged_parameter, unties
from tests.support.lora import logits, make, peft_model, trained

pytestmark = pytest.mark.numerics
peft = pytest.importorskip("peft", minversion="0.21")

CASES = [("llama", dict(target_modules="all-linear")), ("gpt2", dict(target_modules="all-linear", use_rslora=True)),
         ("llama", dict(target_modules=["q_proj", "embed_tokens"])), ("gpt2", dict(target_modules=["c_proj", "wpe"])),
         ("llama", dict(target_modules=["k_proj", "down_proj", "embed_tokens"], use_dora=True)),
         ("gpt2", dict(target_modules=["c_attn", "c_proj", "wpe"], use_dora=True)), ("mixtral", dict(target_modules="all-linear")),
         ("gpt_oss", dict(target_modules=["o_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
                          rank_pattern={"down_proj": 5})),
         ("qwen3_moe", dict(target_modules=[], target_parameters=["gate.weight", "experts.down_proj"])),
         ("llama", dict(target_modules=["v_proj"], modules_to_save=["lm_head"]))]


def adapted(name: str, arguments: dict[str, Any], dtype: torch.dtype) -> tuple[Targets, dict[str, Tensor], Any]:
    given = peft.LoraConfig(**{"r": 4, "lora_alpha": 7, **arguments})
    model = make(name, dtype)
    targets = resolve(of_object(given), outline_of(model))
    tensors = trained(targets)
    theirs = peft_model(model, given)
    for layer in targets.layers:
        if layer.magnitude_name is not None:  # near what they begin as, or the model would be another
            vector = theirs.base_model.model.get_submodule(layer.name).lora_magnitude_vector["default"].weight.detach().float()
            tensors[layer.magnitude_name] = vector * (0.9 + 0.2 * tensors[layer.magnitude_name])
    assert not peft.set_peft_model_state_dict(theirs, dict(tensors)).unexpected_keys
    return targets, tensors, theirs


def merge(targets: Targets, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    full = {name: tensors["base_model.model." + name] for module in targets.full for name in module.parameters}
    return {name: merged_parameter(targets, name, lambda: values.data, lambda layer: tensors_of(layer, targets, tensors), full)
            for name, values in model.named_parameters()}


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_bits_of_pefts_merge(index: int, dtype: torch.dtype) -> None:
    name, arguments = CASES[index]
    targets, tensors, theirs = adapted(name, arguments, dtype)
    base = make(name, dtype)
    before = {key: values.detach().clone() for key, values in base.named_parameters()}
    ours = merge(targets, tensors, base)
    assert all(torch.equal(values, before[key]) for key, values in base.named_parameters()), "the base is not written to"
    expected = dict(theirs.merge_and_unload().named_parameters())
    assert ours.keys() == expected.keys()
    for key, values in ours.items():
        assert torch.equal(values.to(dtype), expected[key].data), key
    changed = {key for key, values in ours.items() if not torch.equal(values.to(dtype), before[key])}
    assert changed == targets.by_weight.keys() | {key for module in targets.full for key in module.parameters}


@pytest.mark.parametrize("index", range(len(CASES)))
def test_merged_is_unmerged(index: int) -> None:
    name, arguments = CASES[index]
    targets, tensors, theirs = adapted(name, arguments, torch.float32)
    expected = logits(theirs)
    model = make(name)
    for key, values in merge(targets, tensors, model).items():
        model.get_parameter(key).data = values
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    assert (expected - logits(make(name))).abs().max() > 0.05


@pytest.mark.parametrize("name", ("qwen3", "gemma3", "gpt2"))
def test_a_weight_that_stays_one_changes_once(name: str) -> None:
    """peft's merge adds a tied adapter to it twice; what peft computes unmerged is what counts."""
    targets, tensors, theirs = adapted(name, dict(target_modules=["lm_head", "q_proj", "c_attn"], ensure_weight_tying=True), torch.float32)
    twice = {key: values for key, values in tensors.items() if "embedding" in key}
    head = theirs.base_model.model.lm_head
    with torch.no_grad():  # what peft loads into one of the two tensors that share their memory is in the other
        assert torch.equal(head.lora_B["default"].weight, twice[next(key for key in twice if key.endswith("_A"))].t())
    expected = logits(theirs)
    model = make(name)
    assert not unties(targets) and targets.by_weight.keys() == {layer.weight for layer in targets.layers if layer.name != "lm_head"}
    for key, values in merge(targets, tensors, model).items():
        model.get_parameter(key).data = values
    assert model.get_input_embeddings().weight is model.lm_head.weight
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_weights_that_become_two() -> None:
    """An adapter on one end alone: merging has to store both, or the other end changes, too."""
    for arguments in (dict(target_modules=["lm_head"]), dict(target_modules=["embed_tokens"]),
                      dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"])):
        targets, tensors, theirs = adapted("qwen3", arguments, torch.float32)
        assert unties(targets)
        expected = logits(theirs)
        model = make("qwen3")
        changed = merge(targets, tensors, model) if "lm_head" not in arguments["target_modules"] else {
            key: merged(layer, model.lm_head.weight.data, tensors_of(layer, targets, tensors)) for key, layer in targets.by_weight.items()}
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        for key, values in changed.items():
            model.get_parameter(key).data = values
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    targets, *_ = adapted("llama", dict(target_modules=["lm_head"]), torch.float32)
    assert not unties(targets)
    targets, *_ = adapted("qwen3", dict(target_modules=["q_proj"]), torch.float32)
    assert not unties(targets)


def test_a_merged_model_is_stored_and_loaded(tmp_path: Path) -> None:
    import transformers

    targets, tensors, theirs = adapted("mixtral", dict(target_modules="all-linear"), torch.bfloat16)
    model = make("mixtral", torch.bfloat16)
    for key, values in merge(targets, tensors, model).items():
        model.get_parameter(key).data = values
    model.save_pretrained(tmp_path)
    loaded = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).named_parameters())
    expected = dict(theirs.merge_and_unload().named_parameters())
    assert loaded.keys() == expected.keys() and all(torch.equal(values, expected[key]) for key, values in loaded.items())


def test_what_is_not_finite_is_not_stored() -> None:
    targets, tensors, _ = adapted("llama", dict(target_modules=["q_proj"]), torch.float32)
    layer = targets.layers[0]
    tensors[layer.b_name][0, 0] = torch.inf
    with pytest.raises(RatelError, match="is not finite with its adapter added"):
        merged(layer, torch.zeros(32, 32), tensors_of(layer, targets, tensors))
