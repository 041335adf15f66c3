"""Configurations of Hugging Face directories, read and refused before anything is built."""

from pathlib import Path
from typing import Any

from ratel.errors import RatelError
from ratel.models.checkpoints.refusals import refuse_directory, refuse_quantized, refuse_shared_keys
from ratel.reading import read_json, refuse_odd_entries
from ratel.schema import SchemaError, check, record, shown, text

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST_LAYERS = 2048
"""More layers than any model has; each is built in outline before its weights are looked at."""
_LARGEST_NUMBER = 1 << 53
_CONFIG = record({"model_type": text("[^/\\\\\\x00]+", "the name of a kind of model")}, is_open=True)


def read_config(directory: Path) -> Any:
    """The configuration in a directory. Raises RatelError; never runs code from the directory."""
    from transformers import AutoConfig

    path = directory / "config.json"
    refuse_directory(directory)
    if not path.exists():
        raise RatelError("there is no config.json in the directory", field="model", value=directory,
                         remedy="Give a Hugging Face model directory")
    try:
        refuse_odd_entries(directory)  # transformers opens by name what it finds there
        settings = read_json(path, allow_infinity=True)  # Mamba's time_step_limit is infinite
        model_type = check(settings, _CONFIG)["model_type"]
        _check_sizes(settings)
    except SchemaError as error:
        has_type = isinstance(settings, dict) and "model_type" in settings
        raise RatelError(str(error) if has_type else "the configuration has no model_type", field="model", value=path,
                         remedy="Give a directory that transformers' save_pretrained wrote") from error
    except (OSError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        raise RatelError(f"not a readable configuration ({reason})", field="model", value=path,
                         remedy="Download or save the files again") from error
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if _is_unknown(model_type):
            raise RatelError(f"unknown model type {model_type!r}", field="model", value=directory, remedy="Install a "
                             "newer transformers, or build the model yourself and give the module") from error
        raise RatelError(f"transformers does not accept the configuration: {error}", field="model", value=path,
                         remedy="Correct config.json") from error


def _check_sizes(settings: Any, where: str = "") -> None:
    """Numbers that no model has would be tried for minutes, or end in whatever overflows first."""
    entries = settings.items() if isinstance(settings, dict) else enumerate(settings) if isinstance(settings, list) else ()
    for name, value in entries:
        place = f"{where}[{name}]" if isinstance(name, int) else f"{where}.{name}".lstrip(".")
        if isinstance(value, int) and not -_LARGEST_NUMBER <= value <= (_MOST_LAYERS if name in _LAYERS else _LARGEST_NUMBER):
            raise SchemaError(f"{place} is out of range: {shown(value)}")
        _check_sizes(value, place)


def _is_unknown(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type not in CONFIG_MAPPING


def refuse_config(config: Any, name: str) -> None:
    """What a configuration alone shows to be wrong."""
    if getattr(config, "is_encoder_decoder", False):
        raise RatelError("an encoder-decoder model has two stacks of blocks, and only one can be streamed",
                         field="model", value=name, remedy="Use a decoder-only model")
    refuse_quantized(config, name)
    refuse_shared_keys(config, name)


def causal_class(config: Any, name: str) -> type | None:
    """The class that predicts the next token: None where transformers chooses it; of models for
    images and text the whole class, whose other parts are carried along unchanged."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    mapping = AutoModelForImageTextToText._model_mapping
    found = mapping[type(config)] if type(config) in mapping else ()
    classes = [found] if isinstance(found, type) else list(found)
    asked = next((c for c in classes if c.__name__ in (config.architectures or [])), None)
    if asked is None and type(config) in AutoModelForCausalLM._model_mapping:
        return None
    if not classes:
        raise RatelError(f"transformers has no causal language model of model type {config.model_type!r}", field="model", value=name,
                         remedy="Give a causal language model, --task for another head, or the module with a loss_fn")
    return asked or classes[0]
