"""Models by name, to start from scratch: shapes that people train and compare with."""

import difflib
from typing import Any

from ratel.errors import RatelError

Settings = dict[str, Any]


def _gpt(layers: int, heads: int, hidden: int) -> Settings:
    return {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 2048, "n_embd": hidden, "n_layer": layers,
            "n_head": heads, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, inner: int, *, vocab: int = 32000, length: int = 4096,
           tied: bool = False, theta: float = 10000.0, bos: int = 1, eos: int = 2) -> Settings:
    return {"model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": inner,
            "max_position_embeddings": length, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "bos_token_id": bos, "eos_token_id": eos}


def _llama3(layers: int, hidden: int, heads: int, kv_heads: int, inner: int, **more: Any) -> Settings:
    return _llama(layers, hidden, heads, kv_heads, inner, vocab=128256, length=8192, theta=500000.0, bos=128000,
                  eos=128001, **more)


def _qwen3(layers: int, hidden: int, heads: int, kv_heads: int, inner: int, *, tied: bool = False,
           **more: Any) -> Settings:
    return {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128, "intermediate_size": inner,
            "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "bos_token_id": 151643,
            "eos_token_id": 151645, **more}


PRESETS: dict[str, Settings] = {
    # 13 M parameters for the byte-level tokenizer: learns visibly on a CPU in a minute.
    "demo": _llama(8, 384, 6, 2, 1024, vocab=512, length=1024, tied=True, bos=256, eos=257),
    # The shapes of the Ratel paper.
    "gpt-6b": _gpt(28, 32, 4096), "gpt-13b": _gpt(40, 40, 5120), "gpt-30b": _gpt(48, 56, 7168),
    "gpt-70b": _gpt(80, 64, 8192), "gpt-135b": _gpt(88, 88, 11264), "gpt-175b": _gpt(96, 96, 12288),
    "gpt-276b": _gpt(112, 112, 14336), "gpt-412b": _gpt(128, 128, 16384),
    "llama-160m": _llama(12, 768, 12, 12, 3072),
    "llama-1b": _llama(22, 2048, 32, 4, 5632),
    # 3.015 B: the shape the measurements against other systems are taken on.
    "llama-3b": _llama(28, 3072, 24, 8, 8192),
    "llama-7b": _llama(32, 4096, 32, 32, 11008), "llama-8b": _llama3(32, 4096, 32, 8, 14336),
    "llama-13b": _llama(40, 5120, 40, 40, 13824), "llama-70b": _llama3(80, 8192, 64, 8, 28672),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 8, 3072, tied=True), "qwen3-1.7b": _qwen3(28, 2048, 16, 8, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 8, 9728, tied=True), "qwen3-8b": _qwen3(36, 4096, 32, 8, 12288),
    "qwen3-14b": _qwen3(40, 5120, 40, 8, 17408), "qwen3-32b": _qwen3(64, 5120, 64, 8, 25600),
    "qwen3-30b-a3b": _qwen3(48, 2048, 32, 4, 6144, model_type="qwen3_moe", num_experts=128, num_experts_per_tok=8,
                            moe_intermediate_size=768, norm_topk_prob=True),
}


def preset_config(name: str, *, num_blocks: int | None = None) -> Any:
    """The configuration of a preset, or of one as wide with another number of blocks. Raises
    RatelError with the names that come close."""
    from transformers import AutoConfig

    if name not in PRESETS:
        raise RatelError("neither a directory nor a preset", field="model", value=name, remedy=_suggestion(name))
    settings = dict(PRESETS[name])
    if num_blocks is not None:
        settings[_depth_key(settings)] = num_blocks
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def preset_blocks(name: str) -> int:
    return PRESETS[name][_depth_key(PRESETS[name])]


def family(name: str) -> list[str]:
    """The presets of one kind with this one, by size."""
    def kind(preset: str) -> tuple[str, str]:
        return preset.partition("-")[0], PRESETS[preset]["model_type"]

    return [preset for preset in PRESETS if kind(preset) == kind(name)]


def _depth_key(settings: Settings) -> str:
    return "n_layer" if "n_layer" in settings else "num_hidden_layers"


def _suggestion(name: str) -> str:
    give = "Give the path of a Hugging Face directory on this machine; nothing is downloaded"
    if "/" in name or "." in name.partition("-")[0]:
        return give
    close = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.4)
    all_of_them = f"Presets are {', '.join(PRESETS)}"
    close_by = " or ".join(close)
    return f"{f'Did you mean {close_by}? ' if close else ''}{give}. {all_of_them}"
