"""A shrunken configuration builds a small model with every kind of layer that the large one has."""

from typing import Any

import pytest
import torch

from ratel.models.checks.shrink import VOCAB, WINDOW, random_parameters, shrunken

pytestmark = pytest.mark.unit

LARGE: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {}, "GPT2LMHeadModel": {}, "MixtralForCausalLM": {}, "GptOssForCausalLM": {}, "Gemma2ForCausalLM": {},
    "Qwen3MoeForCausalLM": {"mlp_only_layers": [0, 3]}, "DeepseekV3ForCausalLM": {}, "JambaForCausalLM": {},
    "Qwen3NextForCausalLM": {}, "Zamba2ForCausalLM": {}, "Mamba2ForCausalLM": {}, "FalconForCausalLM": {},
    "Llama4ForCausalLM": {}, "Gemma3ForCausalLM": {}}


def large_config(name: str) -> Any:
    import transformers

    return getattr(transformers, name).config_class(**LARGE[name])


def build(name: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, name)._from_config(shrunken(large_config(name)), dtype=torch.float32)


@pytest.mark.parametrize("name", LARGE)
def test_a_shrunken_model_is_small_and_runs(name: str) -> None:
    model = random_parameters(build(name)).eval()
    assert sum(p.numel() for p in model.parameters()) < 10_000_000
    with torch.no_grad():
        logits = model(input_ids=torch.randint(3, 96, (1, 40)), use_cache=False).logits
    assert logits.shape == (1, 40, VOCAB) and logits.isfinite().all()


@pytest.mark.parametrize("name", LARGE)
def test_every_kind_of_layer_is_kept_and_windows_are_short(name: str) -> None:
    before = large_config(name).get_text_config().to_dict()
    after = shrunken(large_config(name)).get_text_config().to_dict()
    for list_name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if isinstance(before.get(list_name), list):
            assert set(after[list_name]) == set(before[list_name])
    for window in ("sliding_window", "attention_chunk_size"):
        if before.get(window) is not None:
            assert after[window] == WINDOW


def test_layers_named_by_their_numbers_stay_where_they_were() -> None:
    assert shrunken(large_config("Qwen3MoeForCausalLM")).mlp_only_layers == [0, 3]


def test_a_configuration_is_left_alone_and_shrinks_once() -> None:
    config = large_config("GptOssForCausalLM")
    before = config.to_dict()
    small = shrunken(config)
    assert config.to_dict() == before and shrunken(small).to_dict() == small.to_dict()


def test_random_values_come_from_the_seed_and_reach_buffers() -> None:
    states = [random_parameters(build("DeepseekV3ForCausalLM"), seed).state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not any(torch.equal(value, states[2][name]) for name, value in states[0].items())
    assert any(name.endswith("e_score_correction_bias") and value.ne(0).all() for name, value in states[0].items())
