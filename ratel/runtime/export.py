"""Writes the trained model as a Hugging Face directory, a few units in memory at a time."""

import errno
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.models import Parts
from ratel.models.checkpoints.other_state import as_tensors
from ratel.models.safetensors_files import INDEX_SUFFIX, SUFFIX
from ratel.models.shards import SHARD_BYTES, Piece, write_shards
from ratel.plan.shape import UnitSpec
from ratel.runtime.durable_files import discard_all_but, existing_part, replace_directory, replaceable
from ratel.store.transfer import PIECE_ELEMENTS
from ratel.units import format_bytes

Weights = Callable[[UnitSpec], Iterable[tuple[int, Tensor]]]
"""A unit's fp32 weights, 1-D on the CPU in its layout, in pieces from the first to the last: ``(begin, values)``."""


def export_model(parts: Parts, weights: Weights, path: Path, dtype: torch.dtype,
                 beside: Callable[[Path], None] | None = None) -> Path:
    """Write ``path`` (replaced once complete; what else was in it stays): config, sharded safetensors, index. Returns it.

    In bf16 weights are rounded half up on the bits, as the `hi` plane is, so that the exported model is the one that was
    trained. ``beside`` writes further files into the directory that it is given, before that has its name.
    """
    path = replaceable(path, "export")
    from safetensors import SafetensorError

    unfinished = _unfinished(path)
    try:
        parts.save_config(unfinished, dtype)
        _write_shards(parts, weights, unfinished, dtype)
        if beside is not None:
            beside(unfinished)
        # Not beside it as NAME.old: that is what people call the model that they want to keep.
        replace_directory(unfinished, path, partial(discard_all_but, _is_others, into=path),
                          old=path.with_name(path.name + ".replaced"))
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # reading may have failed as well
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RatelError(f"the model cannot be written: {error}", field="export", value=path,
                         remedy="Make room there, or give another directory") from error
    return path


def _unfinished(path: Path) -> Path:
    unfinished = path.with_name(path.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise RatelError(f"cannot be made: {error.strerror}", field="export", value=path,
                         remedy="Give a directory that you may write to") from error
    return unfinished


def _is_others(name: str) -> bool:
    """Of what lies in an older export's directory. Its weights and moments go: a shard or an index that the new one does
    not have would be read with it."""
    return not (name.startswith(("model", "optimizer")) and name.endswith((SUFFIX, INDEX_SUFFIX)))


def check_room(parts: Parts, path: Path, dtype: torch.dtype) -> None:
    """Before the steps that a model comes out of. ``path`` need not exist."""
    free, needed = shutil.disk_usage(existing_part(path)).free, parts.spec.num_params * dtype.itemsize
    if free < needed:
        raise RatelError(f"has {format_bytes(free)} free, and the trained model takes {format_bytes(needed)}", field="--out",
                         value=path, remedy="Make room there, give another directory, or use --no-export")


def _write_shards(parts: Parts, weights: Weights, directory: Path, dtype: torch.dtype) -> None:
    """A shard holds no more than the largest unit, for which the plan has room."""

    def read(unit: UnitSpec) -> Iterable[tuple[int, Tensor]]:
        if parts.unused is None or unit is not parts.unused:
            return weights(unit)
        flat = torch.empty(unit.num_elements, dtype=torch.float32)
        parts.read_unit(unit, flat)
        return [(0, flat)]

    units = [*parts.spec.units, *([parts.unused] if parts.unused else [])]
    pieces = [Piece(num_bytes=unit.num_params * dtype.itemsize, make=partial(_tensors_of, unit, read, dtype)) for unit in units]
    write_shards(directory, "model", [*pieces, _buffers(parts)], metadata={"format": "pt"}, shard_bytes=SHARD_BYTES)


def _buffers(parts: Parts) -> Piece:
    """Counted as nothing, so that they never make a shard of their own: a model's buffers are a few KB."""
    return Piece(num_bytes=0,
                 make=lambda: as_tensors(parts.other_state()))


def _tensors_of(unit: UnitSpec, weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {param.name: torch.empty(param.shape, dtype=dtype) for param in unit.params}
    for begin, values in weights(unit):
        end = begin + values.numel()
        for param in unit.params:
            first, last = max(param.offset, begin), min(param.end, end)
            if first < last:
                part = tensors[param.name].view(-1)[first - param.offset : last - param.offset]
                _convert(values[first - begin : last - begin], part)
    return tensors


def _convert(values: Tensor, out: Tensor) -> None:
    """In pieces: a conversion as a whole would hold the values three times over."""
    for begin in range(0, values.numel(), PIECE_ELEMENTS):
        piece = values[begin : begin + PIECE_ELEMENTS]
        if out.dtype is torch.bfloat16:
            piece = ((piece.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
        out[begin : begin + PIECE_ELEMENTS] = piece
