"""What a directory's disk carries while it is read and written at once: the plain loop that bounds
are taken from."""

import os
from typing import Any

from nvme_ds import Engine
from nvme_ds.bench import EngineRunner, IoBenchSpec
from nvme_ds.reference import METHODS

TICKET_BYTES = 16 << 20


def mixed_bps(directory: str, num_bytes: int) -> float | None:
    """Bytes/s of both directions together, half of them written, past the page cache: of the faster
    of two plain loops, one on io_uring and one on threads. None where the file system has no
    O_DIRECT (RAM disks of older kernels)."""
    spec = IoBenchSpec(directories=(directory,), num_bytes=num_bytes, file_bytes=num_bytes, ticket_bytes=TICKET_BYTES)
    try:
        with Engine(queue_depth=spec.queue_depth, num_threads=spec.num_threads) as engine:
            runner = EngineRunner(spec, engine, f"ratel-rate-{os.getpid()}")
            runner.run("write")  # blocks that were never written are read without touching the device
            return max(num_bytes / _seconds(runner, method) for method in METHODS)
    except OSError as error:
        print(f"{directory}: {error}", flush=True)
        return None


def _seconds(runner: Any, method: str) -> float:
    try:
        return runner.reference("mixed", method)
    except OSError:  # io_uring is often forbidden in containers
        return float("inf")
