"""Writes the trained model as a Hugging Face directory, a few units in memory at a time."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ratel.errors import RatelError, remedy_for
from ratel.models import Parts
from ratel.models.checkpoints.export_layout import ExportLayout, UnitToExport
from ratel.models.checkpoints.weights import round_half_up
from ratel.models.safetensors.writer import SHARD_BYTES, Piece, write_shards
from ratel.ownership import exports
from ratel.planner.shape import UnitSpec
from ratel.runtime.states.durable_files import existing_part, make_directory, move_others, replace_directory, replaceable
from ratel.store.transfer import PIECE_ELEMENTS
from ratel.synced import sync_tree
from ratel.units import format_bytes

_REPLACED = ".replaced"
Weights = Callable[[UnitSpec], Iterable[tuple[int, Tensor]]]
"""A unit's fp32 weights, 1-D on the CPU in its layout, in pieces from the first to the last:
``(begin, values)``."""


def export_model(parts: Parts, weights: Weights, path: Path, dtype: torch.dtype,
                 beside: Callable[[Path], None] | None = None, more: Sequence[Piece] = ()) -> Path:
    """Write ``path`` (replaced once complete; what else was in it stays): the weights as the
    checkpoint had them, and what lay beside them (docs/models.md). Returns it. It has its name only
    when all of it is on disk.

    In bf16 weights are rounded half up on the bits, as the `hi` plane is, so that the exported
    model is the one that was trained. ``beside`` writes further files into the directory that it is
    given, before that has its name; ``more``: tensors that the model has not.
    """
    def write(unfinished: Path) -> None:
        parts.stored.write_beside(unfinished, dtype)
        if beside is not None:
            beside(unfinished)
        _write_shards(parts, weights, unfinished, dtype, more)  # last: they say which files were written with them

    return export_directory(path, "the model", write)


def export_directory(path: Path, what: str, write: Callable[[Path], None]) -> Path:
    """``write`` fills the directory that it is given, weights last, which takes the place of
    ``path`` when all of it is on disk; what else was in that stays. Returns it. ``what``: for
    messages."""
    path = export_target(path, "export")
    from safetensors import SafetensorError

    unfinished = _unfinished(path)
    try:
        write(unfinished)
        exports.complete(unfinished)
        sync_tree(unfinished)
        exports.give_up(path)
        # Not beside it as NAME.old: that is what people call the model that they want to keep.
        replace_directory(unfinished, path, partial(_discard, into=path), suffix=_REPLACED)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # reading may have failed as well
        exports.remove_unfinished(unfinished)
        raise RatelError(f"{what} cannot be written: {error}", field="export", value=path,
                         remedy="Make room there, or give another directory" if not isinstance(error, OSError) else
                         remedy_for(error, "Make room there, or give another directory")) from error
    return path


def export_target(path: Path, field: str) -> Path:
    """Where a model goes that is exported to ``path``, links followed. Refuses a directory with a
    model of somebody else's."""
    path = replaceable(path, field)
    exports.settle(path, path.with_name(path.name + _REPLACED))
    taken = exports.others_in_the_way(path)
    if taken:
        raise RatelError(f"holds {taken[0]}, which no export has written, or which was changed since", field=field, value=path,
                         remedy="Move it away, or give another directory")
    unfinished = _unfinished_of(path)
    if os.path.lexists(unfinished) and not exports.is_unfinished(unfinished):
        names = os.listdir(unfinished) if unfinished.is_dir() else [unfinished.name]
        foreign = sorted(set(names) - exports.own_files(unfinished))
        if foreign:
            raise RatelError(f"holds {foreign[0]}, which no export has written", field=field, value=unfinished,
                             remedy="Move it away, or give another directory")
    return path


def _unfinished_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _unfinished(path: Path) -> Path:
    unfinished = _unfinished_of(path)
    try:
        if os.path.lexists(unfinished):
            exports.remove_unfinished(unfinished)
        make_directory(path.parent)
        unfinished.mkdir()
        exports.begin(unfinished)
    except OSError as error:
        raise RatelError(f"cannot be made: {error.strerror}", field="export", value=path,
                         remedy="Give a directory that you may write to") from error
    return unfinished


def _discard(old: Path, into: Path) -> None:
    """The files of an older export go: a shard or an index that the new one does not have would be
    read with it."""
    move_others(sorted(set(os.listdir(old)) - exports.own_files(old)), old, into)
    exports.remove_export(old)


def check_room(num_params: int, path: Path, dtype: torch.dtype) -> None:
    """Before the steps that a model, or an adapter, comes out of. ``path`` need not exist."""
    free, needed = shutil.disk_usage(existing_part(path)).free, num_params * dtype.itemsize
    if free < needed:
        raise RatelError(f"has {format_bytes(free)} free, and what was trained takes {format_bytes(needed)}", field="--out",
                         value=path, remedy="Make room there, give another directory, or use --no-export")


def _write_shards(parts: Parts, weights: Weights, directory: Path, dtype: torch.dtype, more: Sequence[Piece]) -> None:
    """What is in memory at a time is the parameters that one tensor of the checkpoint, or one group
    of them, is made from."""
    layout = parts.stored.export_layout(dtype)
    pieces = [Piece(outlines=unit.outlines, make=partial(_tensors_of, layout, unit, weights)) for unit in layout.units]
    pieces += [Piece(outlines=unit.outlines, make=partial(_tensors_of, layout, unit, partial(_unused, parts))) for unit in layout.unused]
    pieces.append(Piece(outlines=layout.other.outlines, make=partial(layout.convert_other, parts.stored.other_state())))
    pieces += more
    write_shards(directory, "model", pieces, metadata=exports.metadata_for(directory), shard_bytes=SHARD_BYTES)


def _unused(parts: Parts, unit: UnitSpec) -> Iterable[tuple[int, Tensor]]:
    flat = torch.empty(unit.num_elements, dtype=torch.float32)
    parts.stored.read_unit(unit, flat)
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
