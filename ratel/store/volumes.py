"""Volumes on the SSD directories of a session: opened, made, and refused in the words of its
options."""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ratel import interrupt, native
from ratel.errors import RatelError, remedy_for
from ratel.ownership.stamps import STAMP_BYTES, Stamp, is_superseded
from ratel.planner.machine.stripes import Weights


@dataclass(frozen=True, kw_only=True)
class IoOptions:
    directories: tuple[str, ...] = ()
    stripes: Weights = ()
    """How many stripes each directory gets in one round; (): one each."""
    backend: str = "auto"
    bandwidth_bps: float | None = None
    direct: str = "auto"
    queue_depth: int = 32
    stripe_bytes: int = 1 << 20
    checksums: bool = True


def open_engine(io: IoOptions) -> "native.nvme_ds.Engine":
    try:
        return native.nvme_ds.Engine(backend=io.backend, queue_depth=io.queue_depth, bandwidth_bps=io.bandwidth_bps,
                                     while_waiting=interrupt.check)
    except OSError as error:
        raise RatelError(f"the I/O engine cannot start: {error}", field="io_backend", value=io.backend,
                         remedy="Use --io-backend threads or auto") from error


def reopen_volume(engine: "native.nvme_ds.Engine", files: Sequence[Path], num_bytes: int, io: IoOptions) -> "native.nvme_ds.Volume":
    name = files[0].name.rpartition(".")[0]
    try:
        return engine.open_volume([path.parent for path in files], name, num_bytes,
                                   stripe_bytes=io.stripe_bytes, weights=io.stripes or None, direct=io.direct,
                                   tail_bytes=STAMP_BYTES)
    except OSError as error:
        raise RatelError(f"cannot be opened: {error}", field="state", value=files[0],
                         remedy="End the run that uses it, or resume from another state") from error


def create_volume(engine: "native.nvme_ds.Engine", name: str, num_bytes: int, io: IoOptions) -> "native.nvme_ds.Volume | None":
    if num_bytes == 0:
        return None
    try:
        return engine.create_volume(list(io.directories), name, num_bytes, stripe_bytes=io.stripe_bytes,
                                     weights=io.stripes or None, direct=io.direct,
                                     tail=lambda index: Stamp(volume=name, index=index).pack(),
                                     may_replace=is_superseded)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ELOOP):
            raise RatelError(error.strerror, field="ssd", value=error.filename,
                             remedy="Remove it, or give other directories") from error
        if error.errno == errno.EINVAL and io.direct == "on":
            raise RatelError(str(error), field="direct", value="on", remedy="Use --direct auto, or another directory"
                             ) from error
        if error.errno == errno.EBUSY:
            raise RatelError(f"another run has its states there: {error}", field="ssd",
                             value=",".join(map(os.fspath, io.directories)),
                             remedy="Wait for that run, or give other directories") from error
        raise RatelError(f"no place for {num_bytes} bytes of {name}: {error}", field="ssd",
                         value=",".join(map(os.fspath, io.directories)),
                         remedy=remedy_for(error, "Give directories on a drive with enough free space that you may write to")
                         ) from error


def pattern_of(io: IoOptions) -> list[int]:
    return native.nvme_ds.layout.stripe_pattern(io.stripes or [1] * len(io.directories))
