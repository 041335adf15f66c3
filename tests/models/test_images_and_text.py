"""Text training of models for images and text: the text's part is trained, gradients are
autograd's, the rest is carried along."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file
from torch import nn

from ratel.models import load
from ratel.models.checkpoints.config import causal_class
from ratel.models.checks.shrink import random_parameters, shrunken
from ratel.runtime.session.session import Session
from ratel.verify.loading import compare_loading
from tests.models.test_loading import SIZES
from tests.support.models import CPU, attach_all, named, next_token_loss, vertical_pass

pytestmark = pytest.mark.numerics

ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]))
IDS = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14)
QWEN_TOWER = dict(depth=3, num_heads=4, hidden_size=32)

CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2.5-vl": lambda: t.Qwen2_5_VLConfig(text_config=dict(**SIZES, **ROPE), **IDS,
                                             vision_config=dict(**QWEN_TOWER, intermediate_size=64, out_hidden_size=32)),
    "qwen3-vl": lambda: t.Qwen3VLConfig(text_config=dict(**SIZES, head_dim=8, **ROPE), **IDS, vision_config=dict(
        **QWEN_TOWER, intermediate_size=64, out_hidden_size=32, deepstack_visual_indexes=[0], num_position_embeddings=16)),
    "mistral3": lambda: t.Mistral3Config(text_config=t.MistralConfig(**SIZES, head_dim=8), image_token_index=90,
                                         vision_config=t.PixtralVisionConfig(**TOWER)),
    "llava": lambda: t.LlavaConfig(text_config=t.LlamaConfig(**SIZES), vision_config=t.CLIPVisionConfig(**TOWER),
                                   image_token_index=90),
    "gemma3": lambda: t.Gemma3Config(text_config=dict(**SIZES, head_dim=8, sliding_window=8), vision_config=TOWER,
                                     image_token_index=90, mm_tokens_per_image=4)}


def written(family: str, directory: Path) -> nn.Module:
    config = CONFIGS[family]()
    torch.manual_seed(0)
    model = t.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_autograds(family: str, tmp_path: Path) -> None:
    model = written(family, tmp_path).train()
    assert compare_loading(tmp_path) == []
    ids = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(1))
    parts = load(tmp_path, dtype=torch.float32, device=CPU)
    assert type(parts.module) is type(model) and parts.isolates_documents
    _, grads = attach_all(parts)
    loss = vertical_pass(parts, {"input_ids": ids, "labels": ids})
    plain = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)
    plain.backward()
    found, expected = named(parts, grads, trained_only=True), dict(model.named_parameters())
    assert torch.equal(loss, plain) and len(found) >= 20
    for name, grad in found.items():
        assert torch.equal(grad, expected[name].grad), name
    assert all(expected[p.name].grad is None for p in parts.unused.params)
    parts.close()


@pytest.mark.parametrize("family", ["qwen2.5-vl", "mistral3", "gemma3"])
def test_the_export_has_the_parts_that_were_not_trained(family: str, tmp_path: Path) -> None:
    model = written(family, tmp_path / "in")
    with Session(tmp_path / "in", dtype="fp32", device="cpu", lr=1e-2) as session:
        session.step({"input_ids": torch.randint(3, 80, (2, 12))})
        session.export(tmp_path / "out", dtype="fp32")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vis" in name or "projector" in name for name in changed)
    assert (tmp_path / "in" / "config.json").read_text().split() == (tmp_path / "out" / "config.json").read_text().split()
    _, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_class_is_the_one_that_the_directory_names() -> None:
    """transformers would build the text's part alone of some, and the other would be lost."""
    config = t.Llama4Config(architectures=["Llama4ForConditionalGeneration"])
    assert causal_class(config, "x") is t.Llama4ForConditionalGeneration
    assert causal_class(t.Llama4Config(architectures=["Llama4ForCausalLM"]), "x") is None
    assert causal_class(t.LlamaConfig(architectures=["LlamaForCausalLM"]), "x") is None


@pytest.mark.parametrize("config", ["DeepseekV4Config", "Gemma4TextConfig", "KimiLinearConfig"])
def test_models_that_need_more_than_hidden_states_of_three_dimensions(config: str) -> None:
    """Streams of each token, keys kept for others, recurrent layers beside attention."""
    if not hasattr(t, config):
        pytest.skip(f"transformers {t.__version__} has no {config}")
    torch.manual_seed(0)
    model = random_parameters(t.AutoModelForCausalLM.from_config(shrunken(getattr(t, config)()), dtype=torch.float32)).train()
    plain = copy.deepcopy(model)
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    loss = next_token_loss(plain(input_ids=ids, use_cache=False).logits, ids)
    loss.backward()
    parts = load(model, dtype=torch.float32, device=CPU)
    _, grads = attach_all(parts)
    assert torch.equal(vertical_pass(parts, {"input_ids": ids, "labels": ids}), loss)
    for name, grad in named(parts, grads, trained_only=True).items():
        expected = plain.get_parameter(name).grad
        assert torch.equal(grad, torch.zeros_like(grad) if expected is None else expected), name
    parts.close()
