"""Writes the trained model as a Hugging Face directory, a few units in memory at a time."""

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.models import Parts
from ratel.models.checkpoints.export_layout import ExportLayout, UnitToExport
from ratel.models.safetensors_files import INDEX_SUFFIX, SUFFIX
from ratel.models.shards import SHARD_BYTES, Piece, write_shards
from ratel.models.weights import round_half_up
from ratel.plan.shape import UnitSpec
from ratel.runtime.durable_files import discard_all_but, existing_part, replace_directory, replaceable
from ratel.store.transfer import PIECE_ELEMENTS
from ratel.units import format_bytes

Weights = Callable[[UnitSpec], Iterable[tuple[int, Tensor]]]
"""A unit's fp32 weights, 1-D on the CPU in its layout, in pieces from the first to the last: ``(begin, values)``."""


def export_model(parts: Parts, weights: Weights, path: Path, dtype: torch.dtype,
                 beside: Callable[[Path], None] | None = None) -> Path:
    """Write ``path`` (replaced once complete; what else was in it stays): the weights as the checkpoint had them, and what lay
    beside them (docs/models.md). Returns it.

    In bf16 weights are rounded half up on the bits, as the `hi` plane is, so that the exported model is the one that was
    trained. ``beside`` writes further files into the directory that it is given, before that has its name.
    """
    path = replaceable(path, "export")
    from safetensors import SafetensorError

    unfinished = _unfinished(path)
    try:
        parts.write_beside(unfinished, dtype)
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
    free, needed = shutil.disk_usage(existing_part(path)).free, parts.num_params * dtype.itemsize
    if free < needed:
        raise RatelError(f"has {format_bytes(free)} free, and the trained model takes {format_bytes(needed)}", field="--out",
                         value=path, remedy="Make room there, give another directory, or use --no-export")


def _write_shards(parts: Parts, weights: Weights, directory: Path, dtype: torch.dtype) -> None:
    """What is in memory at a time is the parameters that one tensor of the checkpoint, or one group of them, is made from."""
    layout = parts.export_layout(dtype)
    pieces = [Piece(outlines=unit.outlines, make=partial(_tensors_of, layout, unit, weights)) for unit in layout.units]
    pieces += [Piece(outlines=unit.outlines, make=partial(_tensors_of, layout, unit, partial(_unused, parts))) for unit in layout.unused]
    pieces.append(Piece(outlines=layout.other.outlines, make=partial(layout.convert_other, parts.other_state())))
    write_shards(directory, "model", pieces, metadata={"format": "pt"}, shard_bytes=SHARD_BYTES)


def _unused(parts: Parts, unit: UnitSpec) -> Iterable[tuple[int, Tensor]]:
    flat = torch.empty(unit.num_elements, dtype=torch.float32)
    parts.read_unit(unit, flat)
    return [(0, flat)]


def _tensors_of(layout: ExportLayout, unit: UnitToExport, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """A group of parameters is stored, and forgotten, as soon as the last of them is complete."""
    held: dict[str, Tensor] = {}
    missing = {param.name: param.num_elements for param in unit.spec.params}
    for begin, values in weights(unit.spec):
        end = begin + values.numel()
        for param in unit.spec.params:
            first, last = max(param.offset, begin), min(param.end, end)
            if first < last or not param.num_elements:
                name = unit.stored_names[param.name]
                if name not in held:
                    held[name] = torch.empty(param.shape, dtype=layout.dtype_of(name))
                _convert(values[first - begin : last - begin], held[name].view(-1)[first - param.offset : last - param.offset])
                missing[param.name] -= last - first
        yield from layout.completed(unit, held, missing)


def _convert(values: Tensor, out: Tensor) -> None:
    """In pieces: a conversion as a whole would hold the values three times over."""
    for begin in range(0, values.numel(), PIECE_ELEMENTS):
        piece = values[begin : begin + PIECE_ELEMENTS]
        out[begin : begin + PIECE_ELEMENTS] = round_half_up(piece) if out.dtype is torch.bfloat16 else piece
