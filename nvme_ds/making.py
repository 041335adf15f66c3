"""The making of a volume: its files, and what native code must know of them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from nvme_ds import files, native
from nvme_ds.errors import checked
from nvme_ds.layout import file_sizes, stripe_pattern
from nvme_ds.options import check_layout
from nvme_ds.volume import Volume

if TYPE_CHECKING:
    from nvme_ds.engine import Engine

MakeFiles = Callable[[list[str], list[int], ExitStack], list[int]]
"""From paths and sizes to open files; what is undone if the volume does not come about goes on the
stack."""

_DIRECT = {"off": 0, "auto": 1, "on": 2}


def make_volume(engine: Engine, make_files: MakeFiles, directories: Sequence[str | os.PathLike], name: str, num_bytes: int,
                stripe_bytes: int, weights: Sequence[float] | None, direct: str, keep: bool) -> Volume:
    engine.require_open()
    folders = [os.path.realpath(directory) for directory in directories]
    weights = [1] * len(folders) if weights is None else list(weights)
    check_layout(folders, name, num_bytes, stripe_bytes, weights, direct)
    num_bytes = -(-num_bytes // files.ALIGNMENT) * files.ALIGNMENT
    pattern = stripe_pattern(weights)
    paths = files.volume_paths(folders, name)
    with ExitStack() as undo:  # from the first file on: no exception comes between its making and somebody who removes it
        fds = make_files(paths, file_sizes(num_bytes, stripe_bytes, pattern), undo)
        inodes = [files.inode_of(os.fstat(fd)) for fd in fds]
        is_direct = files.bypass_page_cache(fds, paths, direct, refuse=engine._no_direct)
        how = _DIRECT[direct] if is_direct else _DIRECT["off"]
        handle = _add_volume(engine, folders, fds, paths, pattern, stripe_bytes, num_bytes, how)
        undo.pop_all()
    volume = Volume(engine, handle, paths, inodes, num_bytes, is_direct, keep, pattern, stripe_bytes)
    with engine._lock:
        engine._volumes[handle] = volume
    return volume


def _add_volume(engine: Engine, folders: list[str], fds: list[int], paths: list[str], pattern: list[int], stripe_bytes: int,
                num_bytes: int, direct: int) -> int:
    count = len(fds)
    devices = [engine.device(folder) for folder in folders]
    spec = native.VolumeSpec(
        num_files=count, devices=(ctypes.c_int32 * count)(*devices), fds=(ctypes.c_int32 * count)(*fds),
        paths=(ctypes.c_char_p * count)(*map(os.fsencode, paths)), pattern_length=len(pattern),
        pattern=(ctypes.c_uint32 * len(pattern))(*pattern), stripe_bytes=stripe_bytes, num_bytes=num_bytes,
        direct=direct)
    return checked(engine._native.volume_add(engine._handle, ctypes.byref(spec)), "adding a volume")
