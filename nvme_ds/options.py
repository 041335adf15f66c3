"""What a caller may ask of an engine and of a volume; every refusal names the argument, the value
and what is right."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from types import SimpleNamespace

from nvme_ds.files import ALIGNMENT

logger = logging.getLogger("nvme_ds")

BACKENDS = {"io_uring": 0, "threads": 1}
MAX_STALL_TIMEOUT_S = 365 * 86400.0  # in nanoseconds far below what the native side counts to
MAX_QUEUE_DEPTH = 4096  # what every io_uring kernel grants one ring


def check_options(backend: str, queue_depth: int, num_threads: int, request_bytes: int, stall_timeout_s: float) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: choose auto, io_uring or threads (given: {backend!r})")
    if not 1 <= queue_depth <= MAX_QUEUE_DEPTH:
        raise ValueError(f"queue_depth: must be 1..{MAX_QUEUE_DEPTH} (given: {queue_depth})")
    if num_threads < 1:
        raise ValueError(f"num_threads: must be at least 1 (given: {num_threads})")
    if request_bytes < ALIGNMENT or request_bytes % ALIGNMENT or request_bytes > 1 << 30:
        raise ValueError(f"request_bytes: must be a multiple of {ALIGNMENT} up to 1 GiB (given: {request_bytes})")
    if not 0 < stall_timeout_s <= MAX_STALL_TIMEOUT_S:
        raise ValueError(f"stall_timeout_s: must be above 0 and at most {MAX_STALL_TIMEOUT_S:.0f} "
                         f"(given: {stall_timeout_s})")


def choose_backend(functions: SimpleNamespace, backend: str, queue_depth: int) -> str:
    """``io_uring`` or ``threads``; OSError for a forced choice that is impossible here."""
    if backend == "threads":
        return backend
    error = -functions.uring_probe(queue_depth)
    if error == 0:
        return "io_uring"
    reason = "not in this kernel or this build" if error == errno.ENOSYS else os.strerror(error)
    if backend == "io_uring":
        raise OSError(error, f"io_uring is not available here ({reason}): containers and the sysctl "
                             "kernel.io_uring_disabled may forbid it. Choose backend auto or threads")
    logger.warning("io_uring is not available here (%s); using threads", reason)
    return "threads"


def check_layout(folders: list[str], name: str, num_bytes: int, stripe_bytes: int, weights: list[float],
                 direct: str) -> None:
    if not folders or len(set(folders)) != len(folders):
        raise ValueError(f"directories: at least one, and each only once (given: {folders})")
    if not name or "/" in name:
        raise ValueError(f"name: must be a plain file name (given: {name!r})")
    if num_bytes <= 0:
        raise ValueError(f"num_bytes: must be positive (given: {num_bytes})")
    if stripe_bytes < ALIGNMENT or stripe_bytes % ALIGNMENT:
        raise ValueError(f"stripe_bytes: must be a multiple of {ALIGNMENT} (given: {stripe_bytes})")
    if len(weights) != len(folders):
        raise ValueError(f"weights: one for each of the {len(folders)} directories (given: {weights})")
    if direct not in ("auto", "on", "off"):
        raise ValueError(f"direct: choose auto, on or off (given: {direct!r})")


def caps_by_directory(bandwidth_bps: float | Mapping[str, float] | None) -> dict[str | None, float]:
    """Caps by real directory; the key None holds the one for all others."""
    caps = bandwidth_bps if isinstance(bandwidth_bps, Mapping) else {None: bandwidth_bps or 0.0}
    for directory, cap_bps in caps.items():
        if cap_bps < 0:
            raise ValueError(f"bandwidth_bps: cannot be negative (given: {cap_bps} for {directory or 'all'})")
    return {directory and os.path.realpath(directory): float(cap_bps) for directory, cap_bps in caps.items()}
