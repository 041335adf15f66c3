"""An adapter in files: `adapter_config.json` and `adapter_model.safetensors`, as peft and vLLM read
them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.lora.describe.config import LoraConfig
from ratel.lora.describe.layers import PREFIX, AdaptedLayer
from ratel.lora.describe.older_names import with_fused
from ratel.lora.describe.outline import CONV1D, ModelOutline
from ratel.lora.describe.peft_config import CONFIG_FILE, encode, of_directory, settings_of
from ratel.lora.describe.stored_config import stored_config
from ratel.lora.describe.targets import Targets, resolve
from ratel.lora.values.initial import LayerTensors
from ratel.models.safetensors.files import DTYPES, TensorFiles
from ratel.models.safetensors.header import read_header
from ratel.models.safetensors.writer import Outline, Piece, write_shards
from ratel.ownership import exports
from ratel.synced import write_synced

WEIGHTS_STEM = "adapter_model"
WEIGHTS_FILE = f"{WEIGHTS_STEM}.safetensors"
BASE_KEY = "ratel_base"
"""In the metadata of the weights: the fingerprint of the base. peft passes over it."""

_WHOLE = 1 << 62
"""No adapter is split into files: peft reads one."""
_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """One that was read. ``tensors``: fp32, by their names in the file, those of tied layers left
    out. ``base_copies``: parameters of the base that peft has stored beside it; what is loaded must
    be equal to them."""

    config: LoraConfig
    targets: Targets
    tensors: dict[str, Tensor]
    base_copies: dict[str, Tensor]
    base: str | None
    """The fingerprint of its base, where Ratel has written it."""


def write_adapter(directory: Path, targets: Targets, tensors: Mapping[str, Tensor], *, base_name: str | None = None,
                  base: str | None = None, task: str | None = "CAUSAL_LM", dtype: torch.dtype = torch.float32) -> None:
    """Write both files into a directory that has neither, synced. ``tensors``: by their names in
    the file, without those of tied layers; ``base``: the base's fingerprint. Raises OSError."""
    settings = settings_of(stored_config(targets), base=base_name, task=task,
                           is_transposed=any(layer.kind == CONV1D for layer in targets.layers))
    write_synced(directory / CONFIG_FILE, encode(settings))
    every = {**tensors, **_tied(targets, tensors)}
    pieces = [Piece(outlines={name: Outline(shape=shape, dtype=dtype)},
                    make=lambda name=name: [(name, every[name].detach().to(device="cpu", dtype=dtype))])
              for name, shape in targets.file_shapes.items()]
    metadata = exports.metadata_for(directory) | ({BASE_KEY: base} if base else {})
    write_shards(directory, WEIGHTS_STEM, pieces, metadata=metadata, shard_bytes=_WHOLE)


def read_adapter(directory: Path, outline: ModelOutline, *, base: str | None = None, field: str = "lora") -> StoredAdapter:
    """An adapter for this model. ``base``: the model's fingerprint, if known. Raises RatelError for
    one that is not whole, or was made for another base."""
    config = of_directory(directory, field)
    file = _File(path=_weights_file(directory, field), field=field)
    header = read_header(file.path, field)
    for name, entry in header.tensors.items():
        if entry.dtype_name not in DTYPES:
            file.refuse(f"{_plain(name)} is stored as {entry.dtype_name}, not in floating point",
                        "Use the adapter as it was before quantisation")
    stored = header.metadata.get(BASE_KEY)
    if stored is not None and base is not None and stored != base:
        file.refuse_base(f"its base has the fingerprint {stored[:23]}..., this model {base[:23]}...")
    targets = resolve(config, outline)
    tensors = _read(TensorFiles([file.path], field), targets, file)
    copies = _base_copies(tensors, targets)
    own = {name: values.float() for name, values in tensors.items() if name not in copies}
    for name, values in own.items():
        if not torch.isfinite(values).all():
            file.refuse(f"{_plain(name)} holds numbers that are not finite",
                        "Use an adapter of an earlier step; this one has diverged")
    return StoredAdapter(config=config, targets=targets, tensors=_without_tied(own, targets, file), base=stored,
                         base_copies={parameter: tensors[name] for name, parameter in copies.items()})


@dataclass(frozen=True, kw_only=True)
class _File:
    """The weights, and the option that they were given by, for refusals."""

    path: Path
    field: str

    def refuse(self, message: str, remedy: str) -> NoReturn:
        raise RatelError(message, field=self.field, value=self.path, remedy=remedy)

    def refuse_base(self, reason: str) -> NoReturn:
        self.refuse(f"was made for another base: {reason}", "Give the model that it was trained on")


def _read(files: TensorFiles, targets: Targets, file: _File) -> dict[str, Tensor]:
    """All tensors, once their names are those that the model gives an adapter, and with the shapes
    that it gives them."""
    found = with_fused(files.tensors, targets.layers, targets.outline, files.read)
    copies = _base_copies(found, targets)
    _refuse_names(found.keys() - copies.keys(), targets, file)
    wanted = targets.file_shapes | {name: _shape_in(targets.outline, parameter) for name, parameter in copies.items()}
    tensors = {}
    for name in sorted(found):
        stored = files.tensors.get(name)  # none where it is made of several
        if stored is not None:
            _refuse_shape(name, stored.shape, wanted[name], file)
        try:
            tensors[name] = found[name]()
        except RuntimeError:
            file.refuse(f"has parts of {_plain(name)} that do not fit together", "Copy the adapter again")
        _refuse_shape(name, tuple(tensors[name].shape), wanted[name], file)
    return tensors


def tensors_of(layer: AdaptedLayer, targets: Targets, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Those of one layer; of a tied one, the other way round from where they are."""
    if layer.tied_to is not None:
        first = next(other for other in targets.layers if other.name == layer.tied_to)
        return LayerTensors(a=tensors[first.b_name].t(), b=tensors[first.a_name].t())
    return LayerTensors(a=tensors[layer.a_name], b=tensors[layer.b_name],
                        magnitude=tensors[layer.magnitude_name] if layer.magnitude_name else None)


def named(layer: AdaptedLayer, values: LayerTensors) -> dict[str, Tensor]:
    """Tensors of a layer under their names in the file."""
    found = {layer.a_name: values.a, layer.b_name: values.b}
    return found | ({layer.magnitude_name: values.magnitude} if layer.magnitude_name and values.magnitude is not None else {})


def _weights_file(directory: Path, field: str) -> Path:
    path, pickle = directory / WEIGHTS_FILE, directory / f"{WEIGHTS_STEM}.bin"
    if not path.exists() and pickle.exists():
        raise RatelError(f"has its weights in {pickle.name}, a pickle, which can run programs", field=field, value=directory,
                         remedy="Save it again with peft's save_pretrained, which writes safetensors")
    if not path.exists():
        raise RatelError(f"is cut off: it has {CONFIG_FILE} and no {WEIGHTS_FILE}", field=field, value=directory,
                         remedy="Copy the adapter again")
    return path


def _tied(targets: Targets, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of tied layers and modules, which the file has a second time."""
    found = {}
    for layer in (layer for layer in targets.layers if layer.tied_to):
        found |= named(layer, tensors_of(layer, targets, tensors))
    for module in (module for module in targets.full if module.tied_to):
        found[f"{PREFIX}{module.name}.weight"] = tensors[f"{PREFIX}{module.tied_to}.weight"]
    return found


def _without_tied(own: dict[str, Tensor], targets: Targets, file: _File) -> dict[str, Tensor]:
    """What is there a second time must be the same."""
    for name, values in _tied(targets, own).items():
        if not torch.equal(own.pop(name), values):
            file.refuse(f"has two adapters where the model has one weight: {_plain(name)} is not the embedding's",
                        "Use one that was trained with ensure_weight_tying, or say ensure_weight_tying false in its description")
    return own


def _base_copies(names: Mapping[str, object], targets: Targets) -> dict[str, str]:
    """Names in the file -> parameters of the base: peft stores embeddings that are adapted, or that
    were made longer."""
    outline = targets.outline
    parameters = {f"{PREFIX}{layer.file_name}.base_layer.weight": layer.weight for layer in targets.layers}
    parameters |= {f"{PREFIX}{name}.weight": f"{name}.weight" for name in (outline.embedding, outline.head) if name}
    return {name: parameter for name, parameter in parameters.items() if name in names and name not in targets.file_shapes}


def _shape_in(outline: ModelOutline, parameter: str) -> tuple[int, ...]:
    module, _, attribute = parameter.rpartition(".")
    return outline.by_name[module].parameters[attribute]


def _refuse_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], file: _File) -> None:
    if found != wanted:
        file.refuse_base(f"{_plain(name)} has the shape {list(found)}, and this model gives it {list(wanted)}")


def _refuse_names(found: "set[str]", targets: Targets, file: _File) -> None:
    missing, unknown = sorted(targets.file_shapes.keys() - found), sorted(found - targets.file_shapes.keys())
    single = next((name for name in unknown if _SINGLE_EXPERT.search(name)), None)
    if single is not None:
        file.refuse(f"has adapters for single experts ({_plain(single)}) that cannot be made one for all, because some have none",
                    "Copy the adapter again, or give the model that it was trained on")
    full = next((name for name in missing if any(name in module.file_shapes for module in targets.full)), None)
    if full is not None:
        file.refuse(f"lacks {_plain(full)}, which {CONFIG_FILE} says was trained as a whole (modules_to_save)",
                    "Copy the adapter again, or save it again with peft")
    if missing:
        file.refuse(f"lacks {_plain(missing[0])}{_and_more(missing)}, or was made for another base",
                    "Copy the adapter again, or give the model that it was trained on")
    if unknown:
        are = "is" if len(unknown) == 1 else "are"
        file.refuse_base(f"{_plain(unknown[0])}{_and_more(unknown)} {are} not what {CONFIG_FILE} gives this model")


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX)


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
