"""AdamW's moments between their tiers and files that PyTorch reads, one plane of one unit in memory
at a time."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ratel.models import Parts
from ratel.models.checkpoints.weights import view
from ratel.models.safetensors.writer import SHARD_BYTES, Outline, Piece
from ratel.optimizer_state.files import MOMENTS, MomentFiles, key_of
from ratel.optimizer_state.writing import write_moments
from ratel.planner.shape import ModelSpec, UnitSpec
from ratel.store.transfer import UnitTransfer, aligned_empty

PLANES = dict(zip(("m", "v"), MOMENTS))


def export_moments(spec: ModelSpec, read_plane: Callable[[UnitSpec, str], Tensor], step: int, directory: Path) -> None:
    """Write the moments of all trained parameters into ``directory``. ``read_plane`` gives a plane
    on the CPU, in fp32."""
    pieces = [Piece(outlines={key_of(PLANES[plane], p.name): Outline(shape=p.shape, dtype=torch.float32)
                              for p in unit.params if p.trainable},
                    make=partial(_tensors_of, unit, plane, read_plane))
              for unit in spec.units if unit.num_trainable for plane in PLANES]
    write_moments(directory, pieces, step=step, shard_bytes=SHARD_BYTES)


def _tensors_of(unit: UnitSpec, plane: str, read_plane: Callable[[UnitSpec, str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    flat = read_plane(unit, plane)
    return ((key_of(PLANES[plane], p.name), view(flat, p)) for p in unit.params if p.trainable)


def open_moments(path: "str | os.PathLike[str] | None") -> MomentFiles | None:
    return None if path is None else MomentFiles(Path(path), "optimizer_state")


def check_moments(files: MomentFiles | None, parts: Parts) -> None:
    """Refuse moments that are not this model's, as soon as it is known what of it is trained."""
    if files is not None and parts.probed:
        files.check(param for unit in parts.spec.units for param in unit.params if param.trainable)


def import_moments(spec: ModelSpec, transfer: UnitTransfer, files: MomentFiles) -> None:
    """Bring the moments of every unit to their tiers. `check_moments` comes before; the caller
    waits for the copies."""
    units = [unit for unit in spec.units if unit.num_trainable]
    buffer = aligned_empty(max((unit.num_trainable for unit in units), default=0), torch.float32)
    for unit in units:
        for plane, moment in PLANES.items():
            values = buffer[: unit.num_trainable].zero_()
            for param in unit.params:
                if param.trainable:
                    files.read_into(moment, param, values[param.offset : param.end])
            transfer.write_moment(unit, plane, values)
