"""RunLoRA's models, and what it has published of them beside peft (arXiv 2312.03415 and its code's
README): less time and less memory for forward and backward, on a GPU of 80 GB that it does not
name."""

from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]


def _llama(layers: int, hidden: int, heads: int, inner: int) -> Settings:
    return {"model_type": "llama", "vocab_size": 32000, "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": inner,
            "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


MODELS: dict[str, Settings] = {
    # ReLoRA's shapes, which RunLoRA took. Its code has the file of 60m alone.
    "llama-60m": _llama(8, 512, 8, 1376), "llama-130m": _llama(12, 768, 12, 2048), "llama-250m": _llama(24, 768, 16, 2560),
    "llama-350m": _llama(24, 1024, 16, 2736), "llama-1.3b": _llama(24, 2048, 32, 5461),
    "opt-350m": {"model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "word_embed_proj_dim": 512, "ffn_dim": 4096,
                 "num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 2048,
                 "do_layer_norm_before": False, "dropout": 0.1},
}
LINEARS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")}
"""What gets adapters, by the model's type."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """``memory_mb``: RunLoRA's and peft's above the weights, where they are published; ``seq_len``:
    its own default, the longest that the model takes, where nothing is said."""

    model: str
    batch: int
    rank: int
    time_saved: float
    """Percent of peft's time."""
    memory_mb: tuple[float, float] | None = None
    seq_len: int = 1024

    @property
    def memory_saved(self) -> float | None:
        """Percent of peft's memory."""
        return None if self.memory_mb is None else 100 * (1 - self.memory_mb[0] / self.memory_mb[1])

    @property
    def targets(self) -> tuple[str, ...]:
        return LINEARS[MODELS[self.model]["model_type"]]


ROWS = (
    Row(model="llama-60m", batch=64, rank=8, time_saved=13.62, memory_mb=(25774.76, 25830.73)),
    Row(model="llama-130m", batch=64, rank=8, time_saved=14.86, memory_mb=(42853.7, 42937.7)),
    Row(model="llama-250m", batch=60, rank=32, time_saved=15.9, memory_mb=(74835.38, 75465.23)),
    Row(model="llama-250m", batch=58, rank=64, time_saved=16.54, memory_mb=(72435.24, 73633.74)),
    Row(model="llama-250m", batch=58, rank=128, time_saved=16.93, memory_mb=(72433.74, 74867.99)),
    Row(model="llama-350m", batch=48, rank=128, time_saved=16.44, memory_mb=(70667.72, 72687.87)),
    Row(model="llama-350m", batch=46, rank=256, time_saved=16.1, memory_mb=(67742.67, 71604.64)),
    Row(model="opt-350m", batch=42, rank=128, time_saved=28.3, seq_len=512),
    Row(model="llama-1.3b", batch=24, rank=128, time_saved=10.05, memory_mb=(66133.06, 67149.05)),
    Row(model="llama-1.3b", batch=24, rank=256, time_saved=10.69, memory_mb=(66132.01, 68159.73)),
    Row(model="llama-1.3b", batch=24, rank=512, time_saved=12.67, memory_mb=(66132.68, 70166.73)),
)


def published(model: str, rank: int) -> Row | None:
    return next((row for row in ROWS if (row.model, row.rank) == (model, rank)), None)
