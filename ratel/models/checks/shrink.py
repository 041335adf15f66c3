"""A small copy of a model: the same classes and kinds of layers, narrow, few, with windows shorter
than a test's row.

What such a copy does, the model of that configuration does too, as far as it depends on code and
not on sizes: whether documents are kept apart, whether a token sees the next one. It takes a few
MiB and tenths of a second.

No model is listed. Configurations name their sizes alike, so names say what a number is: a width,
heads, layers.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, HEAD_DIM, ROPE_DIM, WINDOW, POSITIONS, VOCAB = 64, 4, 16, 8, 8, 128, 128
MANY_LAYERS = 16
FIRST_SPECIAL = 100
"""Token ids from here to the end of the vocabulary are those that a configuration names; tests draw
from below."""

_HIDDEN = ("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth", "decoder_layers",
           "encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_layers_per_stack")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads")

_RULES: tuple[tuple[str, Callable[[int, "_Sizes"], int]], ...] = (
    (r"^(image|crop)_size$|^num_channels$|^patch_size$|_channels$|pos_embds_dim|_per_layer$", lambda v, s: v),
    (r"sliding_window(_size)?$|attention_window_size|^window_size|^local_attention|keep_window_size|attention_chunk_size"
     r"|index_topk$|attn_chunk_length", lambda v, s: min(v, WINDOW)),
    (r"^(mamba_)?chunk_size$|^block_size$|^index_block_size$", lambda v, s: min(v, WINDOW)),
    (r"^original_max_position", lambda v, s: POSITIONS // 2),
    (r"max_position|n_positions|^n_ctx$|max_seq_len|context_length|model_max_length|max_target_pos|max_source_pos",
     lambda v, s: min(v, POSITIONS)),
    (r"vocab", lambda v, s: min(v, VOCAB)),
    (r"^(?!.*shared).*experts$|^experts_num$", lambda v, s: min(v, 8)),
    (r"shared_experts$|zero_expert_num", lambda v, s: min(v, 2)),
    (r"experts?_per_tok|top_?k$|^moe_k$", lambda v, s: min(v, 2)),
    (r"^n_group$|num_expert_group|n_groups$|ngroups$", lambda v, s: min(v, 2)),
    (r"topk_group", lambda v, s: min(v, 1)),
    (r"first_k_dense|num_dense_layers|moe_layer_start_index|max_window_layers", lambda v, s: min(v, 1)),
    (r"moe_layer_end_index", lambda v, s: s.layers - 1),
    (r"num_kv_shared_layers", lambda v, s: min(v, s.layers // 2)),
    (r"mamba_(n|num)_heads|n_mamba_heads|linear_num_(value_)?heads", lambda v, s: min(v, HEADS)),
    (r"linear_num_key_heads|index_n_heads", lambda v, s: min(v, 2)),
    (r"mamba_(d_|head_?)(dim|head)|mamba_headdim", lambda v, s: 2 * WIDTH // HEADS),
    (r"kv_heads|key_value_heads|kv_n_heads", lambda v, s: 1 if v == 1 else HEADS if v >= s.heads else 2),
    (r"(num|n|swa_num|attention)_(attention_)?heads?$|^num_query_groups$", lambda v, s: min(v, HEADS)),
    (r"qk_rope_head_dim", lambda v, s: ROPE_DIM),
    (r"^qk_head_dim$", lambda v, s: HEAD_DIM + ROPE_DIM),
    (r"^head_dim$", lambda v, s: s.head_dim(v)),
    (r"attention_head_dim|attention_head_size", lambda v, s: max(1, round(v * s.heads / s.hidden)) * HEAD_DIM),
    (r"head_dim|kv_channels|^d_head$|^dim_head$|^d_kv$", lambda v, s: HEAD_DIM),
    (r"^rotary_dim$", lambda v, s: max(2, HEAD_DIM * v * s.heads // s.hidden // 2 * 2)),
    (r"mamba_d_ssm", lambda v, s: 2 * WIDTH),
    (r"state_size|d_state", lambda v, s: min(v, 8)),
    (r"(dt|time_step)_rank", lambda v, s: WIDTH // 16),
    (r"lora_rank|_rank$", lambda v, s: min(v, 32)),
    (r"hidden_size|embedding_size|intermediate|ffn|^d_model$|^n_embd$|n_inner|emb(ed|edding)?_dim$|lru_width|^d_?ff$|^d_inner$"
     r"|^dim_ff$|mlp_dim|proj_dim|conv_dim|^input_size$|output_size|feed_forward", lambda v, s: s.width(v)),
)
"""The first that fits a setting's name gives what its number becomes, where it is positive; what
none fits stays."""

_INDICES = re.compile(r"(layers|layer_ids|idxs|indexes|indices)$")
_CHANCES = re.compile(r"dropout|_drop$|pdrop|layerdrop|drop_path|drop_rate|drop_prob|jitter")
_PERIODS = re.compile(r"period|interval|every_n|layer_group_size|sparse_step|layer_step|freq$|pattern$")


class _Sizes:
    """What one configuration's other sizes are measured by."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.hidden = _first(settings, _HIDDEN, WIDTH)
        self.heads = _first(settings, _HEADS, HEADS)
        self.num_layers = _first(settings, _LAYERS, 0)
        self.layers = _layers_kept(settings, self.num_layers)

    def width(self, value: int) -> int:
        """A width in proportion to the hidden states, in eights."""
        return min(max(8, round(value * WIDTH / self.hidden / 8) * 8), 4 * WIDTH)

    def head_dim(self, value: int) -> int:
        """Some configurations name what rotary embeddings turn, or keys as a whole, like this."""
        if value == self.settings.get("qk_rope_head_dim"):
            return ROPE_DIM
        if value == self.settings.get("qk_head_dim"):
            return HEAD_DIM + ROPE_DIM
        return 2 * WIDTH // HEADS if "state_size" in self.settings else HEAD_DIM


def shrunken(config: Any, changes: dict[str, Any] | None = None) -> Any:
    """A configuration of the same class for a small copy, without dropout. ``config`` is not
    changed. ``changes`` are made to the small settings, by name, also inside those that are
    dictionaries."""
    small = type(config).from_dict(_changed(_shrink(config.to_dict()), changes or {}))
    for name in ("architectures", "dtype"):
        setattr(small, name, getattr(config, name, None))
    return small


def _changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {**settings, **{name: _changed(settings[name], value) if isinstance(value, dict) else value
                           for name, value in changes.items()}}


def random_parameters(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter, and every buffer of the state dict that its constructor fills with one
    number, values that its absence would show in: weights by which tokens differ and attention
    chooses, scales and biases that are neither one nor zero."""
    generator = torch.Generator().manual_seed(seed)
    stored = module.state_dict(keep_vars=True)
    seen: set[int] = set()
    with torch.no_grad():
        for name in sorted(stored):
            tensor = stored[name]
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if isinstance(tensor, nn.Parameter) and tensor.dim() >= 2 and min(tensor.shape[-2:]) > 1:
                tensor.copy_(noise * (1.0 if "embed" in name else 1.5 * tensor.shape[-1] ** -0.5))
            elif isinstance(tensor, nn.Parameter):
                tensor.add_(0.2 * noise)
            elif tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):  # others are tables: of decays, of frequencies
                tensor.add_(0.1 * noise.abs())
    return module


def _shrink(settings: dict[str, Any]) -> dict[str, Any]:
    sizes, special = _Sizes(settings), iter(range(FIRST_SPECIAL, VOCAB))
    ids: dict[int, int] = {}

    def token(value: int) -> int:
        if value < FIRST_SPECIAL:
            return value
        return ids.setdefault(value, next(special, VOCAB - 1))

    return {name: _value(name, value, sizes, token) for name, value in settings.items()}


def _value(name: str, value: Any, sizes: _Sizes, token: Callable[[int], int]) -> Any:
    if isinstance(value, dict):
        return _dict(name, value, sizes)
    if isinstance(value, (list, tuple)):
        return type(value)(_list(name, list(value), sizes, token))
    if isinstance(value, float) and _CHANCES.search(name):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name.endswith(("token_id", "token_index")):
        return token(value)
    if name in _LAYERS:
        return sizes.layers if value == sizes.num_layers else min(value, 2)
    rule = next((rule for pattern, rule in _RULES if re.search(pattern, name)), None)
    return rule(value, sizes) if rule is not None and value > 0 else value


def _dict(name: str, values: dict[Any, Any], sizes: _Sizes) -> dict[Any, Any]:
    if name.startswith("rope_"):
        return _rope(values, sizes)
    if "per_layer" in name:
        return {layer: _of_layer(value, sizes) if isinstance(value, dict) else value
                for layer, value in values.items() if int(layer) < sizes.layers}
    return _shrink(values) if name.endswith("_config") or "model_type" in values else values


def _of_layer(values: dict[str, Any], sizes: _Sizes) -> dict[str, Any]:
    """Settings of one layer that differ from the others'. A head that is wider there stays so."""
    whole = {**sizes.settings, **values}
    own = _Sizes(whole)
    small = {name: _value(name, value, own, lambda number: number) for name, value in values.items()}
    if isinstance(values.get("head_dim"), int):
        is_joined = values["head_dim"] == whole.get("qk_nope_head_dim", 0) + whole.get("qk_rope_head_dim", 0)
        is_wider = values["head_dim"] > (sizes.settings.get("head_dim") or values["head_dim"])
        small["head_dim"] = HEAD_DIM + ROPE_DIM if is_joined else 2 * HEAD_DIM if is_wider else HEAD_DIM
    return small


def _list(name: str, values: list[Any], sizes: _Sizes, token: Callable[[int], int]) -> Iterable[Any]:
    if len(values) == sizes.num_layers and sizes.num_layers:
        values = values[:sizes.layers]
    elif _INDICES.search(name) and _are_indices(values, sizes.num_layers):
        return [index for index in values if index < sizes.layers]
    return [_value(name, value, sizes, token) if type(value) is int else value for value in values]


def _are_indices(values: list[Any], num_layers: int) -> bool:
    return all(type(value) is int and 0 <= value < num_layers for value in values) and values == sorted(set(values))


def _rope(settings: dict[str, Any], sizes: _Sizes) -> dict[str, Any]:
    """Lists have an entry for each turned pair of numbers in a head, or shares of them."""
    if any(isinstance(value, dict) for value in settings.values()):
        return {name: _rope(value, sizes) if isinstance(value, dict) else value for name, value in settings.items()}
    turned = ROPE_DIM if "qk_rope_head_dim" in sizes.settings else int(HEAD_DIM * settings.get("partial_rotary_factor", 1.0))
    small = dict(settings)
    for name in ("short_factor", "long_factor"):
        if isinstance(settings.get(name), (list, tuple)):
            small[name] = (list(settings[name]) * turned)[:turned // 2]
    if settings.get("mrope_section"):
        small["mrope_section"] = _shares(list(settings["mrope_section"]), turned // 2)
    if 0 < settings.get("partial_rotary_factor", 1.0) < 1 and "qk_rope_head_dim" in sizes.settings:
        small["partial_rotary_factor"] = ROPE_DIM / sizes.head_dim(sizes.settings.get("head_dim") or 0)
    if settings.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = POSITIONS // 2
    return small


def _shares(values: list[int], total: int) -> list[int]:
    shares = [max(1, value * total // sum(values)) for value in values]
    shares[shares.index(max(shares))] += total - sum(shares)
    return shares


def _layers_kept(settings: dict[str, Any], num_layers: int) -> int:
    """The shortest beginning that has every kind of layer, as lists by layer and periods tell them
    apart: twice, if that does not take many, since some layers of a kind share what they know. Not
    fewer than three."""
    lists = {name: list(value) for name, value in settings.items() if isinstance(value, (list, tuple)) and value}
    by_layer = [values for values in lists.values() if len(values) == num_layers]
    marks = [values for name, values in lists.items() if _INDICES.search(name) and _are_indices(values, num_layers)]
    by_layer += [[layer in values for layer in range(num_layers)] for values in marks]
    by_layer += [[str(layer) in map(str, value) for layer in range(num_layers)] for name, value in settings.items()
                 if isinstance(value, dict) and "per_layer" in name]
    found: dict[tuple, list[int]] = {}
    for layer in range(num_layers):
        found.setdefault(tuple(str(values[layer]) for values in by_layer), []).append(layer + 1)
    once, twice = (max((layers[:count][-1] for layers in found.values()), default=0) for count in (1, 2))
    periods = [value for name, value in settings.items() if type(value) is int and value <= 16 and _PERIODS.search(name)]
    kept = max(3, once, twice if twice <= MANY_LAYERS else 0, *periods)
    return min(num_layers, 2 * kept if settings.get("num_kv_shared_layers") else kept)


def _first(settings: dict[str, Any], names: Iterable[str], default: int) -> int:
    return next((settings[name] for name in names if isinstance(settings.get(name), int) and settings[name] > 0), default)
