"""A model with an adapter added to its weights, as a Hugging Face directory: one unit in memory at
a time, and no device."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ratel import models
from ratel.config import NEXT_TOKEN
from ratel.data.tokens.tokenizer import has_tokenizer, load_for, write_tokenizer
from ratel.errors import RatelError
from ratel.lora.describe.layers import PREFIX
from ratel.lora.describe.outline import outline_of
from ratel.lora.files import StoredAdapter, read_adapter, tensors_of
from ratel.lora.values.fingerprint import base_fingerprint
from ratel.lora.values.merge import merged_parameter, unties
from ratel.models import Parts
from ratel.models.checkpoints.config import read_config
from ratel.models.checkpoints.weights import view
from ratel.models.safetensors.writer import Outline, Piece
from ratel.planner.shape import UnitSpec
from ratel.reading import read_json
from ratel.runtime.session.opening import DTYPES
from ratel.runtime.states.export import export_model
from ratel.synced import replace_synced


def export_merged(model: str, adapter: Path, out: Path, *, dtype: str | None = None) -> Path:
    """Write ``out``: the model of a directory, each weight with its adapter added as peft's merge
    does it in ``dtype`` (by default fp32 of a model that says it is fp32, else bf16). Returns
    it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RatelError("is not an empty directory", field="--out", value=out, remedy="Give one that does not exist")
    if not os.path.isdir(model):
        raise RatelError("is not a directory", field="--model", value=model, remedy="Give the directory of the adapter's base")
    says_fp32 = str(getattr(read_config(Path(model)), "dtype", None)).removeprefix("torch.") == "float32"
    kind = DTYPES[dtype or ("fp32" if says_fp32 else "bf16")]
    parts = models.load(model, dtype=kind, device=torch.device("cpu"))
    try:
        stored = _read(parts, adapter)
        tokenizer, own = load_for(NEXT_TOKEN, model) if has_tokenizer(model) else (None, None)
        heads = _heads_apart(parts, stored, kind, adapter)

        def beside(directory: Path) -> None:
            if tokenizer is not None:
                write_tokenizer(tokenizer, directory, own)
            if heads:
                _say_untied(directory / "config.json")

        export_model(parts, lambda unit: [(0, _merged_unit(parts, unit, stored, kind))], out, kind, beside, heads)
    finally:
        parts.close()
    return out


def _read(parts: Parts, directory: Path) -> StoredAdapter:
    outline = outline_of(parts.module)
    stored = read_adapter(directory, outline, field="--adapter")
    if stored.base is not None:
        read_adapter(directory, outline, base=base_fingerprint(parts), field="--adapter")
    names = {name for unit in parts.spec.units for param in unit.params for name in (param.name, *param.aliases)}
    missing = sorted({*stored.targets.by_weight, *_full(stored)} - names)
    if missing:
        raise RatelError(f"changes {missing[0]}, which the model does not use for the next token", field="--adapter",
                         value=directory, remedy="Merge it with peft")
    _refuse_other_copies(parts, stored, directory)
    return stored


def _refuse_other_copies(parts: Parts, stored: StoredAdapter, directory: Path) -> None:
    """peft stores an embedding beside its adapter: one that was changed would be lost."""
    for unit in parts.spec.units:
        found = [(param, name) for param in unit.params for name in (param.name, *param.aliases) if name in stored.base_copies]
        for param, name in found:
            copy = stored.base_copies[name]
            if not torch.equal(view(_read_unit(parts, unit), param).to(copy.dtype), copy):
                raise RatelError(f"was made for another base: its {name} is not the model's", field="--adapter",
                                 value=directory, remedy="Give the model that it was trained on")


def _heads_apart(parts: Parts, stored: StoredAdapter, dtype: torch.dtype, adapter: Path) -> list[Piece]:
    """Where the adapter makes two of an embedding and a head that are one parameter: the head, which
    the model's own layout has no place for."""
    outline = stored.targets.outline
    if not unties(stored.targets):
        return []
    embedding, heads = f"{outline.embedding}.weight", [f"{name}.weight" for name in outline.tied]
    unit, param = next((unit, param) for unit in parts.spec.units for param in unit.params if param.name == embedding)
    if embedding not in {name for place in parts.stored.export_layout(dtype).units for name in place.outlines}:
        raise RatelError("makes two of an embedding and a head that are one parameter, and the model's files have other names for them",
                         field="--adapter", value=adapter, remedy="Use it unmerged, with peft, or train with ensure_weight_tying")
    return [Piece(outlines={name: Outline(shape=param.shape, dtype=dtype)},
                  make=lambda name=name: [(name, _merged(name, view(_read_unit(parts, unit), param), stored, dtype).to(dtype))])
            for name in heads]


def _say_untied(config: Path) -> None:
    settings = read_json(config, allow_infinity=True)
    replace_synced(config, json.dumps({**settings, "tie_word_embeddings": False}, indent=2, ensure_ascii=False).encode() + b"\n")


def _merged_unit(parts: Parts, unit: UnitSpec, stored: StoredAdapter, dtype: torch.dtype) -> Tensor:
    flat, full = _read_unit(parts, unit), _full(stored)
    for param in unit.params:
        if param.name in full or param.name in stored.targets.by_weight:
            weight = view(flat, param)
            weight.copy_(_merged(param.name, weight, stored, dtype))
    return flat


def _merged(name: str, weight: Tensor, stored: StoredAdapter, dtype: torch.dtype) -> Tensor:
    return merged_parameter(stored.targets, name, lambda: weight.to(dtype),
                            lambda layer: tensors_of(layer, stored.targets, stored.tensors), _full(stored))


def _full(stored: StoredAdapter) -> Mapping[str, Tensor]:
    modules = [module for module in stored.targets.full if module.tied_to is None]
    return {name: stored.tensors[PREFIX + name] for module in modules for name in module.parameters}


def _read_unit(parts: Parts, unit: UnitSpec) -> Tensor:
    flat = torch.empty(unit.num_elements, dtype=torch.float32)
    parts.stored.read_unit(unit, flat)
    return flat
