"""Tiny runs to be interrupted and resumed, and what must be equal afterwards."""

import json
from pathlib import Path
from typing import Any

import ratel

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
OPTIONS = dict(steps=8, batch_size=2, seq_len=16, lr=1e-3, device="cpu", dtype="bf16", micro_batch=2, quiet=True,
               eval_every=3, eval_sequences=2, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.5, dram="4GiB")
CHANGING = {"step_s", "tokens_per_s", "bound_s", "bound_by", "ssd_read_bytes", "ssd_written_bytes",
            "early_units", "redone_units"}
"""What a step measured; it says nothing about what was computed."""


def make_model(path: Path) -> Path:
    """A Hugging Face directory without a tokenizer, with dropout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=272, max_position_embeddings=64, tie_word_embeddings=False,
                         attention_dropout=0.1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def make_text(path: Path) -> Path:
    """So little that eight steps go through it more than twice, with rests of documents waiting in
    between."""
    records = [{"text": f"{word} {n}. " * (3 + n % 3)} for n, word in enumerate(WORDS)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def train(model: Any, data: Any, out: Path, **options: Any) -> ratel.TrainResult:
    return ratel.train(model, data, out=out, **{**OPTIONS, **options})


def records(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CHANGING} for line in lines]


def model_files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "model").iterdir())}


def assert_same_run(out: Path, expected: Path) -> None:
    assert records(out) == records(expected)
    found, wanted = model_files(out), model_files(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
