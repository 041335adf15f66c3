"""A tiny model is fine-tuned as transformers' Trainer does it: losses, gradient norms and what
comes out."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.numerics, pytest.mark.timeout(300),
              pytest.mark.skipif(importlib.util.find_spec("accelerate") is None,
                                 reason="transformers' Trainer needs accelerate: pip install --no-deps accelerate")]
TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from ratel.data.tokens.tokenizer import byte_level_tokenizer

    path, tokenizer = tmp_path_factory.mktemp("tiny"), byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["text", "completions", "conversations"])
def test_ratel_and_trainer_take_the_same_steps(kind: str, tiny: Path) -> None:
    from benchmarks.exactness.against_trainer import compare

    outcome = compare(tiny, kind, steps=4, rows=2, seq_len=128, lr=1e-3)
    assert outcome.is_equal, outcome
    assert outcome.last_loss < outcome.first_loss and outcome.targets > 0
