"""Writing files of moments: into a new directory, or in the place of older ones."""

import glob
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ratel.errors import RatelError
from ratel.models.safetensors_files import INDEX_SUFFIX, SUFFIX
from ratel.models.shards import Piece, write_shards
from ratel.optimizer_state.files import FORMAT, STEM, VERSION


def write_moments(directory: Path, pieces: Sequence[Piece], *, step: int, shard_bytes: int, stem: str = STEM) -> None:
    """Write ``pieces``, whose tensors are named by `key_of`, as files that `MomentFiles` reads."""
    metadata = {"format": FORMAT, "version": str(VERSION), "step": str(step)}
    write_shards(directory, stem, pieces, metadata=metadata, shard_bytes=shard_bytes)


def replace_moments(directory: Path, pieces: Sequence[Piece], *, step: int, shard_bytes: int, stem: str) -> None:
    """As `write_moments`, but an older set of that stem goes only when the new one is complete.

    What makes a set readable, its single file or its index, is removed first and put in place last: shards of two sets
    are never read as one.
    """
    unfinished = directory / f"{stem}.partial"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_moments(unfinished, pieces, step=step, stem=stem, shard_bytes=shard_bytes)
        for name in (stem + INDEX_SUFFIX, stem + SUFFIX):
            (directory / name).unlink(missing_ok=True)
        for shard in directory.glob(f"{glob.escape(stem)}-?????-of-?????{SUFFIX}"):
            shard.unlink()
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name.endswith(INDEX_SUFFIX)):
            os.rename(path, directory / path.name)
    except OSError as error:
        raise RatelError(f"cannot be written: {error.strerror or error}", field="path", value=directory) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
