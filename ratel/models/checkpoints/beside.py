"""What lies beside the weights of a model directory, in an export of the trained model: config.json
with what has changed in it, and every other file byte for byte."""

import copy
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ratel.reading import SMALL_FILE_BYTES, open_regular, read_json

log = logging.getLogger(__name__)

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl",
                   ".pickle", ".msgpack", ".h5", ".gguf", ".onnx", ".onnx_data", ".ot", ".tflite", ".npz", ".nemo")
"""How names of files end that hold weights, which are of the model before training."""

FOLDERS = ("additional_chat_templates",)
"""Folders that are read with the files beside them. Others hold other models, or what a program
keeps for itself."""

CONFIG, GENERATION = "config.json", "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model came from, as it was before anything was changed for training."""

    config: Any = None
    """A copy of transformers' configuration; None for other modules, and where the directory's own
    file is there to be changed."""
    directory: Path | None = None
    settings: dict[str, Any] | None = None
    """What the directory's config.json says."""
    files: tuple[str, ...] = ()
    """Names, in the directory, of what goes along."""
    changes: dict[str, Any] = field(default_factory=dict)
    """What a task says otherwise (labels and the like)."""

    @property
    def name(self) -> str | None:
        """Its directory, or what transformers' configuration says it was loaded from."""
        return str(self.directory.resolve()) if self.directory else getattr(self.config, "_name_or_path", None) or None

    def with_change(self, name: str, value: Any) -> "Origin":
        """The origin with a setting that came to be known in training."""
        config = copy.deepcopy(self.config)
        if config is not None:
            setattr(config, name, value)
        return replace(self, config=config, changes={**self.changes, name: value})

    @classmethod
    def of_directory(cls, directory: Path, changes: dict[str, Any]) -> "Origin":
        return cls(directory=directory, settings=read_json(directory / CONFIG, allow_infinity=True), changes=changes,
                   files=tuple(_files_beside(directory)))

    @classmethod
    def of_module(cls, module: nn.Module) -> "Origin":
        config = getattr(module, "config", None)
        return cls(config=copy.deepcopy(config) if hasattr(config, "save_pretrained") else None)


def write_beside(origin: Origin, module: nn.Module, directory: Path, dtype: torch.dtype) -> None:
    """All but the weights. A module that is not of transformers has nothing beside them."""
    if origin.directory is None:
        if origin.config is not None:
            _write_made(origin, module, directory, dtype)
        return
    for name in origin.files:
        _copy(origin.directory / name, directory / name)
    for folder in {(directory / name).parent for name in origin.files} - {directory}:
        if folder.is_dir():
            _sync(folder)
    _write_json(directory / CONFIG, _changed({**origin.settings, **origin.changes}, module, dtype))


def is_carried(name: str) -> bool:
    """Whether a file of a model directory goes along. Code (`*.py`) does, since config.json names
    it; Ratel runs none of it."""
    return not name.startswith(".") and name != CONFIG and not name.endswith(WEIGHT_SUFFIXES)


def _changed(settings: dict[str, Any], module: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Keys keep their order, and what training does not concern keeps its value."""
    found = _with_dtype(settings, str(dtype).removeprefix("torch."))
    if "dtype" not in found and "torch_dtype" not in found:
        found["dtype"] = str(dtype).removeprefix("torch.")
    found["architectures"] = [type(module).__name__]
    if getattr(module, "_ratel_untied", False):
        found = _untied(found)
    return found


def _with_dtype(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The parts of a composite model have a dtype each."""
    return {key: _with_dtype(value, name) if isinstance(value, dict) and key.endswith("_config") else
            name if key in ("dtype", "torch_dtype") and isinstance(value, str) else value for key, value in settings.items()}


def _untied(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint whose tensors were never one, whatever its config.json said:
    servers go by that."""
    found = {key: _untied(value) if isinstance(value, dict) and key == "text_config" else value for key, value in settings.items()}
    return {**found, "tie_word_embeddings": False}


def _write_made(origin: Origin, module: nn.Module, directory: Path, dtype: torch.dtype) -> None:
    """Write the files of a model that came from no directory."""
    config = copy.deepcopy(origin.config)
    config.architectures = [type(module).__name__]
    config.dtype = dtype
    config.save_pretrained(directory)
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.to_json_file(directory / GENERATION)  # not save_pretrained, which refuses settings that it finds odd
    _sync(directory)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(path)


def _files_beside(directory: Path) -> Iterator[str]:
    for path in sorted(directory.iterdir()):
        if _goes_along(path):
            yield path.name
        elif path.is_dir() and path.name in FOLDERS:
            yield from (f"{path.name}/{file.name}" for file in sorted(path.iterdir()) if _goes_along(file))


def _goes_along(path: Path) -> bool:
    """Whether a file is carried along. A large one is not: one of holes could fill the disk that
    the trained model is written to."""
    if not path.is_file() or not is_carried(path.name):
        return False
    if path.stat().st_size > SMALL_FILE_BYTES:
        log.warning("%s is larger than %d MiB, and will not be in the export", path, SMALL_FILE_BYTES >> 20)
        return False
    return True


def _copy(path: Path, to: Path) -> None:
    """Copy a file's content: a link (as a cache of a hub has) becomes a file, and permissions are
    those of new files. One that is gone by now is no reason to lose what was trained."""
    try:
        source = open_regular(path)
    except OSError as error:
        log.warning("%s cannot be read any more (%s), and is not in the export", path, error.strerror)
        return
    to.parent.mkdir(exist_ok=True)
    with source, to.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())


def _sync(path: Path) -> None:
    for each in sorted(path.iterdir()) if path.is_dir() else [path]:
        descriptor = os.open(each, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
