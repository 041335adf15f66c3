"""Writing files of moments: into a new directory, or in the place of older ones."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from ratel.errors import RatelError
from ratel.models.safetensors.files import INDEX_SUFFIX, SUFFIX
from ratel.models.safetensors.writer import Piece, write_shards
from ratel.optimizer_state.files import FORMAT, STEM, VERSION
from ratel.ownership import exports
from ratel.synced import sync_path, sync_tree


def write_moments(directory: Path, pieces: Sequence[Piece], *, step: int, shard_bytes: int, stem: str = STEM) -> None:
    """Write ``pieces``, whose tensors are named by `key_of`, as files that `MomentFiles` reads."""
    metadata = {"format": FORMAT, "version": str(VERSION), "step": str(step)}
    write_shards(directory, stem, pieces, metadata=metadata, shard_bytes=shard_bytes)


def replace_moments(directory: Path, pieces: Sequence[Piece], *, step: int, shard_bytes: int, stem: str) -> None:
    """Write moments as `write_moments` does, but an older set of that stem goes only when the new
    one is complete and on disk. Files of these names that are no moments are refused.

    What makes a set readable, its single file or its index, is removed first and put in place last:
    shards of two sets are never read as one.
    """
    unfinished = directory / f"{stem}.partial"
    older = _older(directory, stem)
    try:
        exports.remove_unfinished(unfinished)
        unfinished.mkdir(parents=True)
        exports.begin(unfinished)
        write_moments(unfinished, pieces, step=step, stem=stem, shard_bytes=shard_bytes)
        sync_tree(unfinished)
        _put_in_place(unfinished, directory, older)
    except OSError as error:
        raise RatelError(f"cannot be written: {error.strerror or error}", field="path", value=directory) from error
    finally:
        exports.remove_unfinished(unfinished)


def _put_in_place(unfinished: Path, directory: Path, older: list[Path]) -> None:
    new = sorted((path for path in unfinished.iterdir() if path.name != exports.UNFINISHED),
                 key=lambda path: path.name.endswith(INDEX_SUFFIX))
    if len(new) == 1 and all(path.name == new[0].name for path in older):
        os.replace(new[0], directory / new[0].name)  # at any moment one of the two is there
    else:
        for path in older:
            path.unlink()
        sync_path(directory)
        for path in new:
            os.rename(path, directory / path.name)
    sync_path(directory)


def _older(directory: Path, stem: str) -> list[Path]:
    """Files that would be read with the new ones, or go with them; what makes the set readable
    comes first."""
    names = [stem + INDEX_SUFFIX, stem + SUFFIX]
    shards = sorted(directory.glob(f"{glob.escape(stem)}-?????-of-?????{SUFFIX}"))
    found = [*(directory / name for name in names if os.path.lexists(directory / name)), *shards]
    for path in found:
        if not exports.holds_moments(path):
            raise RatelError("is there, and holds no moments that Ratel has written", field="path", value=path,
                             remedy="Move it away, or give another directory")
    return found
