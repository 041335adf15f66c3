"""The yardstick: the plainest native loop over the same files, without the engine."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from nvme_ds import native

WRITES_PER_16 = {"read": 0, "write": 16, "mixed": 8}
METHODS = ("io_uring", "threads")


def reference_io(paths: Sequence[str], pattern: str, *, num_bytes: int, region_bytes: int, request_bytes: int,
                 depth: int, memory_bytes: int, method: str = "io_uring") -> float:
    """Seconds for ``num_bytes`` of each file in sequential O_DIRECT requests, all files at once,
    ``depth`` in flight each.

    ``read`` and ``write`` walk the first ``region_bytes`` of the file and wrap; ``mixed``
    alternates between reads in its lower half and writes in its upper half. ``io_uring`` is a bare
    ring with one thread per file, ``threads`` is ``depth`` threads of pread/pwrite per file.
    Requests rotate through ``memory_bytes`` of memory per file. OSError when the kernel refuses.
    """
    fds = [os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC) for path in paths]
    try:
        spec = native.ReferenceSpec(
            fds=(ctypes.c_int32 * len(fds))(*fds), num_fds=len(fds), use_uring=METHODS.index(method) == 0, depth=depth,
            request_bytes=request_bytes, region_bytes=region_bytes, num_requests=num_bytes // request_bytes,
            memory_bytes=memory_bytes, writes_per_16=WRITES_PER_16[pattern])
        elapsed_ns = native.library().reference_io(ctypes.byref(spec))
    finally:
        for fd in fds:
            os.close(fd)
    if elapsed_ns < 0:
        raise OSError(-elapsed_ns, f"reference {pattern} with {method}: {os.strerror(-elapsed_ns)}")
    return elapsed_ns / 1e9
