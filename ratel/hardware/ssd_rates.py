"""What SSDs carry past every cache of the host: through the I/O engine, with O_DIRECT, as training
moves data."""

import os
from contextlib import ExitStack
from typing import Any

from ratel import native
from ratel.errors import RatelError
from ratel.hardware.storage import require_directory
from ratel.memory.jobs import crew
from ratel.planner.machine.hardware import Ssd
from ratel.units import MIB, align_up

TICKET_BYTES = 16 * MIB
_FIRST_LOOK = 4
"""A rate is first taken over this fraction of the file, to know how much to move in the time
given."""
_SUM_IS_LIMITED = 0.9
"""Below this share of the drives' own rates something that they share is the limit, not noise."""


def measure_ssds(directories: tuple[str, ...], file_bytes: int, limit_s: float) -> tuple[tuple[Ssd, ...], float | None]:
    """Rates of each directory alone, and of all together where that is less than their sum.

    ``file_bytes`` are written in each one first, and removed. ``limit_s``: seconds of each of three
    patterns. Raises RatelError for a directory that cannot be written, has no space, or no
    O_DIRECT.
    """
    with ExitStack() as stack:
        drives = [_open(stack, directory, file_bytes) for directory in directories]
        ssds = tuple(Ssd(**{f"{pattern}_bps": _rate(drive, pattern, limit_s) for pattern in ("read", "write", "mixed")})
                     for drive in drives)
        return ssds, _shared_limit(drives, ssds, limit_s) if len(drives) > 1 else None


def _open(stack: ExitStack, directory: str, file_bytes: int) -> Any:
    bench = native.nvme_ds.bench
    try:
        spec = bench.IoBenchSpec(directories=(str(require_directory(directory)),), ticket_bytes=TICKET_BYTES,
                                 file_bytes=align_up(file_bytes, 2 * TICKET_BYTES))
        engine = stack.enter_context(native.nvme_ds.Engine(queue_depth=spec.queue_depth, num_threads=spec.num_threads))
        drive = bench.EngineRunner(spec, engine, f"ratel-probe-{os.getpid()}")
        drive.run("write", spec.file_bytes)  # blocks that were never written are read without touching the device
    except OSError as error:
        raise RatelError(f"its speed cannot be measured: {error}", field="--ssd", value=directory,
                         remedy="Give a directory with free space on a file system that has O_DIRECT") from error
    return drive


def _rate(drive: Any, pattern: str, limit_s: float) -> float:
    """Bytes/s in both directions together."""
    look_bytes = max(drive.spec.file_bytes // _FIRST_LOOK, TICKET_BYTES)
    num_bytes = _whole_tickets(look_bytes / drive.run(pattern, look_bytes) * limit_s)
    return num_bytes / drive.run(pattern, num_bytes)


def _whole_tickets(num_bytes: float) -> int:
    return max(2, round(num_bytes / TICKET_BYTES)) * TICKET_BYTES


def _shared_limit(drives: list[Any], ssds: tuple[Ssd, ...], limit_s: float) -> float | None:
    """Each drive gets what it moves alone in the time given; together they take longer if they
    share a limit."""
    amounts = [_whole_tickets(ssd.mixed_bps * limit_s) for ssd in ssds]
    with crew(len(drives), "ratel-drives") as threads:
        seconds = list(threads.map(lambda pair: pair[0].run("mixed", pair[1]), zip(drives, amounts)))
    together_bps = sum(amounts) / max(seconds)
    return together_bps if together_bps < _SUM_IS_LIMITED * sum(ssd.mixed_bps for ssd in ssds) else None
