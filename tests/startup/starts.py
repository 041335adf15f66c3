"""A checkpoint for tests of how a run begins."""

from pathlib import Path

import torch


def save_checkpoint(path: Path) -> Path:
    """Two shards, whose order is not the model's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=1500, num_hidden_layers=3, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=10001, max_position_embeddings=64, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="700KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path
