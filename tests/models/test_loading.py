"""The state that a session computes with is the one that `from_pretrained` loads: values, dtypes,
buffers, ties."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ratel.errors import RatelError
from ratel.models import load
from ratel.verify.loading import compare_loading
from tests.support.models import CPU

pytestmark = pytest.mark.numerics

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
DEEPSEEK = dict(SIZES, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=2,
                topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
                qk_nope_head_dim=8, v_head_dim=8)


def configs() -> dict[str, transformers.PreTrainedConfig]:
    t = transformers
    return {"llama": t.LlamaConfig(**SIZES), "qwen3-tied": t.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
            "mixtral": t.MixtralConfig(**SIZES, num_local_experts=4), "deepseek-v3": t.DeepseekV3Config(**DEEPSEEK),
            "gpt-oss": t.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8, sliding_window=8)}


def write(config: transformers.PreTrainedConfig, directory: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A model whose whole state, buffers included, is random."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    model.to(dtype).save_pretrained(directory)
    return model


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3-tied", "mixtral", "deepseek-v3", "gpt-oss"])
def test_it_is_what_from_pretrained_loads(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    write(configs()[family], tmp_path, stored)
    for dtype in (torch.float32, torch.bfloat16):
        assert compare_loading(tmp_path, dtype) == []


def test_products_of_one_stored_tensor_have_sizes_of_their_own(tmp_path: Path) -> None:
    """Lara Mini stores one matrix for four projections that are not of one size."""
    model_class = getattr(transformers, "LaraMiniForCausalLM", None)
    if model_class is None:
        pytest.skip("this transformers has no Lara Mini")
    from ratel.models.checks.shrink import shrunken

    write(shrunken(model_class.config_class()), tmp_path)
    assert compare_loading(tmp_path) == []


def test_the_comparison_sees_a_buffer_that_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ratel.models.checkpoints.directory import CheckpointSource

    write(configs()["deepseek-v3"], tmp_path)
    monkeypatch.setattr(CheckpointSource, "load_buffers", lambda self: None)
    assert any("e_score_correction_bias differs" in line for line in compare_loading(tmp_path))


def test_what_lies_half_way_goes_to_even(tmp_path: Path) -> None:
    """The upper half of a master rounds such numbers up, PyTorch to even; a master keeps all but
    its last bit."""
    write(configs()["llama"], tmp_path)
    halves = torch.tensor([1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256, 1.0]).repeat(8)
    rewrite(tmp_path, lambda t: t.update({"model.norm.weight": halves}))
    assert compare_loading(tmp_path, torch.bfloat16) == []
    parts = load(tmp_path, dtype=torch.bfloat16, device=CPU)
    unit = next(u for u in parts.spec.units if any(p.name == "model.norm.weight" for p in u.params))
    flat = torch.empty(unit.num_elements)
    parts.stored.read_unit(unit, flat)
    param = next(p for p in unit.params if p.name == "model.norm.weight")
    master = flat[param.offset : param.end]
    assert (master - halves).abs().max() <= 2**-23 and torch.equal(master[1::4], halves[1::4])
    parts.close()


def test_unlike_tensors_are_not_tied_whatever_the_configuration_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(configs()["qwen3-tied"], tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with caplog.at_level(logging.WARNING):
        assert compare_loading(tmp_path) == []
    assert "they are not tied" in caplog.text
    parts = load(tmp_path, dtype=torch.float32, device=CPU)
    assert parts.module.lm_head.weight is not parts.module.model.embed_tokens.weight
    parts.close()


def test_like_tensors_that_are_stored_twice_are_tied(tmp_path: Path) -> None:
    write(configs()["qwen3-tied"], tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert compare_loading(tmp_path) == []


def test_one_file_counts_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    write(configs()["llama"], tmp_path)
    rewrite(tmp_path, lambda t: [tensor.add_(1) for tensor in t.values()] and None)
    old = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor - 1 for name, tensor in old.items()}, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}))
    assert compare_loading(tmp_path) == []


def test_a_tensor_in_a_shard_that_the_index_does_not_name_is_read(tmp_path: Path) -> None:
    write(configs()["llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    named = {name: "part.safetensors" for name in list(tensors)[:3]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "consolidated.safetensors")
    assert compare_loading(tmp_path) == []


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"), "lack model.layers.1.mlp.gate.e_score_correction_bias"),
    (lambda t: t.update({"model.layers.1.mlp.gate.e_score_correction_bias": torch.zeros(5)}), r"\[5\], the model needs \[4\]")])
def test_a_buffer_that_transformers_would_make_up_is_refused(change: Callable, message: str, tmp_path: Path) -> None:
    write(configs()["deepseek-v3"], tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(RatelError, match=message):
        load(tmp_path, dtype=torch.float32, device=CPU)


def test_tensors_of_mixed_dtypes(tmp_path: Path) -> None:
    write(configs()["mixtral"], tmp_path)
    rewrite(tmp_path, lambda t: t.update({name: tensor.to([torch.float16, torch.bfloat16, torch.float32][number % 3])
                                          for number, (name, tensor) in enumerate(t.items())}))
    for dtype in (torch.float32, torch.bfloat16):
        assert compare_loading(tmp_path, dtype) == []
