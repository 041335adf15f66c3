"""What of a model's configuration its computation depends on: a run that is continued must have the
same."""

import json
from collections.abc import Mapping
from typing import Any

_NOT_COMPUTED_WITH = frozenset((
    "_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache", "return_dict", "problem_type",
    "id2label", "label2id", "num_labels", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "_experts_implementation", "task_specific_params", "finetuning_task",
    "tokenizer_class", "prefix", "output_hidden_states", "output_attentions", "initializer_range"))
"""Names, what a task decides, what a run may choose, and how weights began."""


def settings_of(config: Any) -> dict[str, Any]:
    """The settings as JSON values; none of a module that has no such configuration."""
    if not hasattr(config, "to_dict"):
        return {}
    return json.loads(json.dumps(_kept(config.to_dict()), default=str))


def differing(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """What both say, and say otherwise: versions of transformers differ in what they leave out."""
    found = []
    for name in sorted(before.keys() & now.keys()):
        if isinstance(before[name], dict) and isinstance(now[name], dict):
            found += differing(before[name], now[name], f"{where}{name}.")
        elif before[name] != now[name]:
            found.append(f"{where}{name} (was {json.dumps(before[name])}, is {json.dumps(now[name])})")
    return found


def _kept(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): _kept(value) if isinstance(value, dict) else value for name, value in settings.items()
            if name not in _NOT_COMPUTED_WITH}
