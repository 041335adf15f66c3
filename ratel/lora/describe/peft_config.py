"""peft's own description of an adapter, as an object or as `adapter_config.json`: read strictly,
and written.

What Ratel cannot do is refused by name. A field that nobody knows yet, of a later peft, is taken as
unset where its value says nothing, and refused otherwise: it may change what the adapter computes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from ratel.errors import RatelError
from ratel.lora.describe.config import ALL_LINEAR, PEFT_FIELDS, SVD_STEPS, LoraConfig
from ratel.reading import read_json
from ratel.schema import SchemaError, anything, boolean, check, listing, mapping, nullable, number, record, shown, text, whole

CONFIG_FILE = "adapter_config.json"
_MOST = 1 << 20


def _text_or(items: Any) -> Any:
    def look(value: Any, where: str) -> None:
        (text() if isinstance(value, str) else listing(items, most=_MOST))(value, where)

    return look


def _init(value: Any, where: str) -> None:
    (text() if isinstance(value, str) else boolean)(value, where)


def _layers(value: Any, where: str) -> None:
    (listing(whole(0, _MOST), most=_MOST) if isinstance(value, list) else whole(0, _MOST))(value, where)


_SCHEMA = record({"peft_type": text()}, {
    "r": whole(1, _MOST), "lora_alpha": number(0, above=True), "lora_dropout": number(0, 1), "use_rslora": boolean,
    "use_dora": boolean,
    "target_modules": nullable(_text_or(text())), "exclude_modules": nullable(_text_or(text())),
    "target_parameters": nullable(listing(text(), most=_MOST)), "modules_to_save": nullable(listing(text(), most=_MOST)),
    "rank_pattern": nullable(mapping(text(), whole(1, _MOST))), "alpha_pattern": nullable(mapping(text(), number(0, above=True))),
    "layers_to_transform": nullable(_layers), "layers_pattern": nullable(_text_or(text())), "init_lora_weights": _init,
    "bias": text(), "ensure_weight_tying": boolean, "base_model_name_or_path": nullable(text()), "task_type": nullable(text()),
    "fan_in_fan_out": boolean}, is_open=True)

_WITHOUT_EFFECT = {"auto_mapping", "revision", "inference_mode", "peft_version", "megatron_core", "qalora_group_size", "eva_config",
                   "corda_config", "loftq_config", "lora_ga_config", "runtime_config", "base_model_name_or_path", "task_type",
                   "fan_in_fan_out", "peft_type", "bias", "init_lora_weights"}
"""Fields that say nothing of what an adapter computes, say it with another field, or are looked at
on their own."""

_KEPT_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Inits after which an adapter is on the base as it is stored."""
_FULL_NAMES = {"lora_bias": "biases of its own (lora_bias)", "trainable_token_indices": "single tokens that are trained",
               "layer_replication": "layers that are there more than once", "use_qalora": "quantised adapters (QALoRA)",
               "alora_invocation_tokens": "activation by tokens (aLoRA)", "megatron_config": "Megatron's layers"}


def is_peft_config(given: object) -> bool:
    """Whether it is one of peft's configurations, of whatever type. Imports nothing."""
    return any(cls.__name__ == "PeftConfig" and cls.__module__.partition(".")[0] == "peft" for cls in type(given).__mro__)


def of_object(given: Any, field: str = "lora") -> LoraConfig:
    """The adapter that a peft.LoraConfig describes, to be made anew. Raises RatelError."""
    values = _plain(asdict(given) if is_dataclass(given) else vars(given))
    values["peft_type"] = _enum_text(values.get("peft_type"))
    values["task_type"] = _enum_text(values.get("task_type"))
    if getattr(given, "_custom_modules", None):
        raise RatelError("has layers of its own for adapters", field=field, value=type(given).__name__,
                         remedy="Target modules that are Linear, Conv1D or Embedding")
    return _config_of(_checked(values, field, type(given).__name__), field, type(given).__name__, is_new=True)


def of_directory(directory: Path, field: str = "lora") -> LoraConfig:
    """The adapter in a directory, to be gone on with. Raises RatelError."""
    return _config_of(read_settings(directory, field), field, directory / CONFIG_FILE, is_new=False)


def read_settings(directory: Path, field: str = "lora") -> dict[str, Any]:
    """What an `adapter_config.json` says, held to the schema."""
    path = directory / CONFIG_FILE
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise RatelError(f"holds no {CONFIG_FILE}, and is no adapter of peft's", field=field, value=directory,
                         remedy="Give the directory that peft's save_pretrained, or a run of Ratel, has written") from None
    except (OSError, ValueError) as error:
        raise RatelError(f"cannot be read: {getattr(error, 'strerror', None) or error}", field=field, value=path,
                         remedy="Copy the adapter again") from error
    return _checked(found, field, path)


def _checked(values: Any, field: str, source: object) -> dict[str, Any]:
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if isinstance(kind, str) and kind.upper() != "LORA":  # first: fields of other types mean other things
        raise RatelError(f"is an adapter of peft's type {shown(kind)}", field=field, value=source,
                         remedy="Use one of the type LORA; the others are not supported")
    try:
        return check(values, _SCHEMA)
    except SchemaError as error:
        raise RatelError(f"is no configuration of an adapter: {error}", field=field, value=source,
                         remedy="Correct the field, or save the adapter again with peft") from error


def _config_of(values: dict[str, Any], field: str, source: object, *, is_new: bool) -> LoraConfig:
    _refuse_others(values, field, source)
    targets = values.get("target_modules")
    pattern = values.get("layers_pattern") or ()
    layers = values.get("layers_to_transform")
    return LoraConfig(
        rank=values.get("r", 8), alpha=values.get("lora_alpha", 8), dropout=values.get("lora_dropout", 0.0),
        targets=_names(targets), exclude=_names(values.get("exclude_modules")) or None,
        parameters=tuple(sorted(values.get("target_parameters") or ())),
        init=_init_of(values.get("init_lora_weights", True), field, source, is_new=is_new),
        rslora=values.get("use_rslora", False), dora=values.get("use_dora", False), rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {}, full=tuple(sorted(values.get("modules_to_save") or ())),
        layers=(tuple(layers) or None) if isinstance(layers, list) else layers,
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern), tied=values.get("ensure_weight_tying", False),
        words={name: f"{field}.{word}" for name, word in PEFT_FIELDS.items()})


def _refuse_others(values: dict[str, Any], field: str, source: object) -> None:
    if values.get("bias", "none") != "none":
        raise RatelError(f"trains biases of the base (bias {shown(values['bias'])})", field=field, value=source,
                         remedy="Use bias 'none'; name modules to be trained as a whole in modules_to_save")
    for name, value in values.items():
        says_nothing = value in (None, False) or value in ({}, [])
        if name not in _WITHOUT_EFFECT and name not in PEFT_FIELDS.values() and not says_nothing:
            what = _FULL_NAMES.get(name, "a setting that is not supported")
            raise RatelError(f"uses {what}: {name} is {shown(value)}", field=field, value=source,
                             remedy="Leave it unset; Ratel does not compute it")


def _init_of(value: bool | str, field: str, source: object, *, is_new: bool) -> str:
    name = value.lower() if isinstance(value, str) else value
    if not is_new and name in _KEPT_BASE:
        return "default"
    if not is_new:
        remedy = ("Save it with peft's path_initial_model_for_weight_conversion, which makes it one for the base as it is stored"
                  if name != "mica" else "Use another init; mica's frozen half is not supported")
        raise RatelError(f"was begun with init_lora_weights {shown(value)}, so it belongs to a base that its training has changed",
                         field=field, value=source, remedy=remedy)
    if name is True:
        return "default"
    if name in ("gaussian", "pissa", "olora") or (isinstance(name, str) and SVD_STEPS.fullmatch(name)):
        return name
    raise RatelError(f"asks for init_lora_weights {shown(value)}, which is not supported", field=field, value=source,
                     remedy="Use true, gaussian, pissa, pissa_niter_N or olora")


def settings_of(config: LoraConfig, *, base: str | None = None, task: str | None = "CAUSAL_LM",
                is_transposed: bool = False) -> dict[str, Any]:
    """`adapter_config.json` of an adapter that is trained: peft loads it for use.
    ``is_transposed``: the weights of targets are stored the other way round (GPT-2's Conv1D).
    Fields of later versions of peft are there only where they say something."""
    assert not config.changes_base, "such an adapter is stored as one for the base as it is (ratel/lora/values/converted.py)"
    names = {name: list(value) if isinstance(value, tuple) else value for name, value in
             (("target_modules", config.targets), ("exclude_modules", config.exclude), ("modules_to_save", config.full or None))}
    settings = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "inference_mode": True, "r": config.rank,
                "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none", "use_rslora": config.rslora,
                "use_dora": config.dora, "rank_pattern": dict(config.rank_pattern), "alpha_pattern": dict(config.alpha_pattern),
                "fan_in_fan_out": is_transposed, "init_lora_weights": True if config.init == "default" else config.init,
                "layers_to_transform": list(config.layers) if isinstance(config.layers, tuple) else config.layers,
                "layers_pattern": list(config.layers_pattern) or None, **names}
    if config.parameters:
        settings["target_parameters"] = list(config.parameters)
    if config.tied:
        settings["ensure_weight_tying"] = True
    return settings


def encode(settings: Mapping[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _names(value: str | list[str] | None) -> str | tuple[str, ...] | None:
    if isinstance(value, str):
        return ALL_LINEAR if value.lower() == ALL_LINEAR else value
    return None if value is None else tuple(sorted(value))


def _plain(value: Any) -> Any:
    """Sets, and objects in them, as JSON has them."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=str)
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _enum_text(value: Any) -> Any:
    return getattr(value, "value", value)
