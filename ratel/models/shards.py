"""Writing safetensors in shards, one shard in memory at a time."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ratel.memory.resident import trim
from ratel.models.safetensors_files import INDEX_SUFFIX, SUFFIX
from ratel.units import MIB

SHARD_BYTES = 64 * MIB
"""Small models stay in one file; the margin that the plan leaves the process covers it."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tensors that come into memory together: ``make`` gives them by name, contiguous and on the CPU."""

    num_bytes: int
    make: Callable[[], dict[str, Tensor]]


def write_shards(directory: Path, stem: str, pieces: Sequence[Piece], *, metadata: dict[str, str],
                 shard_bytes: int) -> None:
    """Write ``stem.safetensors``, or numbered shards and the index ``stem.safetensors.index.json``.

    A shard has ``shard_bytes`` at most, or as many as the largest piece. Every one carries the ``metadata``.
    """
    from safetensors.torch import save_file

    groups = list(_grouped(pieces, shard_bytes))
    single = len(groups) == 1
    weight_map, total_bytes = {}, 0
    for index, group in enumerate(groups, start=1):
        name = stem + SUFFIX if single else f"{stem}-{index:05d}-of-{len(groups):05d}{SUFFIX}"
        tensors: dict[str, Tensor] = {}
        trim()  # small tensors of the last shard would stay in the heap, beside those of this one
        for piece in group:
            tensors |= piece.make()
        save_file(tensors, directory / name, metadata=metadata)
        weight_map |= dict.fromkeys(tensors, name)
        total_bytes += sum(t.numel() * t.element_size() for t in tensors.values())
    if not single:
        index_json = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (directory / (stem + INDEX_SUFFIX)).write_text(json.dumps(index_json, indent=1), encoding="utf-8")


def _grouped(pieces: Sequence[Piece], shard_bytes: int) -> Iterator[list[Piece]]:
    """Pieces in their order, as many together as a shard may hold."""
    limit = max(shard_bytes, *(piece.num_bytes for piece in pieces))
    group: list[Piece] = []
    held = 0
    for piece in pieces:
        if group and held + piece.num_bytes > limit:
            yield group
            group, held = [], 0
        group.append(piece)
        held += piece.num_bytes
    yield group
