"""Writes the trained model as a Hugging Face directory, a few units in memory at a time."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.models import Parts
from ratel.plan.shape import UnitSpec
from ratel.runtime.durable_files import replace_directory
from ratel.units import MIB

PIECE_ELEMENTS = 1 << 22
SHARD_BYTES = 64 * MIB
"""Small models stay in one file; the margin that the plan leaves the process covers it."""


def export_model(parts: Parts, read_unit: Callable[[UnitSpec], Tensor], path: Path, dtype: torch.dtype) -> Path:
    """Write ``path`` (replaced as a whole once complete): config, sharded safetensors, index. Returns it.

    ``read_unit`` gives a unit's fp32 weights, 1-D in its layout. In bf16 they are rounded half up on the bits, as the
    `hi` plane is, so that the exported model is the one that was trained.
    """
    if path.exists() and not path.is_dir():
        raise RatelError("is a file", field="export", value=path, remedy="Give a directory")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parts.save_config(partial, dtype)
    _write_shards(parts, read_unit, partial, dtype)
    replace_directory(partial, path)
    return path


def _write_shards(parts: Parts, read_unit: Callable[[UnitSpec], Tensor], directory: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    groups = list(_grouped(parts, dtype))
    single = len(groups) == 1
    weight_map, total_bytes = {}, 0
    for index, units in enumerate(groups, start=1):
        name = "model.safetensors" if single else f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for unit in units:
            tensors |= _tensors_of(unit, parts, read_unit, dtype)
        if index == len(groups):
            tensors |= {key: value.contiguous() for key, value in parts.persistent_buffers().items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total_bytes += sum(t.numel() * t.element_size() for t in tensors.values())
    if not single:
        index_json = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1), encoding="utf-8")


def _grouped(parts: Parts, dtype: torch.dtype) -> Iterator[list[UnitSpec]]:
    """Units in the order of the spec. A shard holds no more than the largest unit, for which the plan has room."""
    units = [*parts.spec.units, *([parts.unused] if parts.unused else [])]
    limit = max(SHARD_BYTES, max(unit.num_params for unit in units) * dtype.itemsize)
    group: list[UnitSpec] = []
    held = 0
    for unit in units:
        num_bytes = unit.num_params * dtype.itemsize
        if group and held + num_bytes > limit:
            yield group
            group, held = [], 0
        group.append(unit)
        held += num_bytes
    yield group


def _tensors_of(unit: UnitSpec, parts: Parts, read_unit: Callable[[UnitSpec], Tensor],
                dtype: torch.dtype) -> dict[str, Tensor]:
    if parts.unused is not None and unit is parts.unused:
        flat = torch.empty(unit.num_elements, dtype=torch.float32)
        parts.read_unit(unit, flat)
    else:
        flat = read_unit(unit)
    return {p.name: _converted(flat[p.offset : p.end], dtype).view(p.shape) for p in unit.params}


def _converted(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in ``dtype``, made in pieces: a conversion as a whole would hold the values three times over."""
    result = torch.empty(values.numel(), dtype=dtype)
    for begin in range(0, values.numel(), PIECE_ELEMENTS):
        piece = values[begin : begin + PIECE_ELEMENTS]
        if dtype is torch.bfloat16:
            piece = ((piece.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
        result[begin : begin + PIECE_ELEMENTS] = piece
    return result
