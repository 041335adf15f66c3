"""A model with an adapter added to its weights, as a Hugging Face directory: one unit in memory at
a time, and no device."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ratel import models
from ratel.config import NEXT_TOKEN
from ratel.data.tokens.tokenizer import has_tokenizer, load_for, write_tokenizer
from ratel.errors import RatelError
from ratel.lora.files import StoredAdapter, read_adapter, tensors_of
from ratel.lora.fingerprint import base_fingerprint
from ratel.lora.layers import PREFIX
from ratel.lora.merge import merged_parameter, unties
from ratel.lora.outline import outline_of
from ratel.models import Parts
from ratel.models.checkpoints.config import read_config
from ratel.models.checkpoints.weights import view
from ratel.planner.shape import UnitSpec
from ratel.runtime.session.session import DTYPES
from ratel.runtime.states.export import export_model


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
        export_model(parts, lambda unit: [(0, _merged_unit(parts, unit, stored, kind))], out, kind,
                     lambda directory: write_tokenizer(tokenizer, directory, own) if tokenizer is not None else None)
    finally:
        parts.close()
    return out


def _read(parts: Parts, directory: Path) -> StoredAdapter:
    outline = outline_of(parts.module)
    stored = read_adapter(directory, outline, field="--adapter")
    if stored.base is not None:
        read_adapter(directory, outline, base=base_fingerprint(parts), field="--adapter")
    if unties(stored.targets):
        raise RatelError("has an adapter for one of an embedding and a head that are one parameter of the model: with it merged in, "
                         "the other would change, too", field="--adapter", value=directory,
                         remedy="Use it unmerged, with peft, or train with ensure_weight_tying")
    names = {param.name for unit in parts.spec.units for param in unit.params}
    missing = sorted({*stored.targets.by_weight, *_full(stored)} - names)
    if missing:
        raise RatelError(f"changes {missing[0]}, which the model does not use for the next token", field="--adapter",
                         value=directory, remedy="Merge it with peft")
    _refuse_other_copies(parts, stored, directory)
    return stored


def _refuse_other_copies(parts: Parts, stored: StoredAdapter, directory: Path) -> None:
    """peft stores an embedding beside its adapter: one that was changed would be lost."""
    for unit in parts.spec.units:
        for param in [param for param in unit.params if param.name in stored.base_copies]:
            copy = stored.base_copies[param.name]
            if not torch.equal(view(_read_unit(parts, unit), param).to(copy.dtype), copy):
                raise RatelError(f"was made for another base: its {param.name} is not the model's", field="--adapter",
                                 value=directory, remedy="Give the model that it was trained on")


def _merged_unit(parts: Parts, unit: UnitSpec, stored: StoredAdapter, dtype: torch.dtype) -> Tensor:
    flat = _read_unit(parts, unit)
    full = _full(stored)
    for param in unit.params:
        if param.name in full or param.name in stored.targets.by_weight:
            weight = view(flat, param)
            weight.copy_(merged_parameter(stored.targets, param.name, lambda: weight.to(dtype),
                                          lambda layer: tensors_of(layer, stored.targets, stored.tensors), full))
    return flat


def _full(stored: StoredAdapter) -> Mapping[str, Tensor]:
    modules = [module for module in stored.targets.full if module.tied_to is None]
    return {name: stored.tensors[PREFIX + name] for module in modules for name in module.parameters}


def _read_unit(parts: Parts, unit: UnitSpec) -> Tensor:
    flat = torch.empty(unit.num_elements, dtype=torch.float32)
    parts.read_unit(unit, flat)
    return flat
