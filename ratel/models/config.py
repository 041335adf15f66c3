"""Configurations of Hugging Face directories, read and refused before anything is built."""

import json
from pathlib import Path
from typing import Any

from ratel.errors import RatelError


def read_config(directory: Path) -> Any:
    """The configuration in a directory. Raises RatelError; never runs code from the directory."""
    from transformers import AutoConfig

    path = directory / "config.json"
    if not path.is_file():
        raise RatelError("there is no config.json in the directory", field="model", value=directory,
                         remedy="Give a Hugging Face model directory")
    try:
        settings = json.loads(path.read_text())
        model_type = settings["model_type"]
    except (OSError, ValueError) as error:
        raise RatelError(f"not a readable configuration ({error})", field="model", value=path,
                         remedy="Download or save the files again") from error
    except (KeyError, TypeError) as error:
        raise RatelError("the configuration has no model_type", field="model", value=path,
                         remedy="Give a directory that transformers' save_pretrained wrote") from error
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if _is_unknown(model_type):
            raise RatelError(f"unknown model type {model_type!r}", field="model", value=directory, remedy="Install a "
                             "newer transformers, or build the model yourself and give the module") from error
        raise RatelError(f"transformers does not accept the configuration: {error}", field="model", value=path,
                         remedy="Correct config.json") from error


def _is_unknown(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type not in CONFIG_MAPPING


def refuse_config(config: Any, name: str) -> None:
    """What a configuration alone shows to be wrong."""
    if getattr(config, "is_encoder_decoder", False):
        raise RatelError("an encoder-decoder model has two stacks of blocks, and only one can be streamed",
                         field="model", value=name, remedy="Use a decoder-only model")
    if getattr(config, "quantization_config", None) is not None:
        raise RatelError("quantized weights cannot be trained", field="model", value=name,
                         remedy="Use an unquantized checkpoint")
