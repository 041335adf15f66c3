"""What memory and the link between host and device carry. On a CPU device copies are copies within
memory."""

from typing import Any

import torch

from ratel import native
from ratel.hardware.timing import median_seconds
from ratel.memory.arena import Arena
from ratel.memory.jobs import Crew
from ratel.memory.lanes import Lanes

TRIAD_BYTES, RESCALE_BYTES = 12, 8
"""DRAM traffic of an element: two read and one written; one read and written. Both use streaming or
in-place stores."""


def measure_dram(pool: Any, num_bytes: int, limit_s: float) -> float:
    """Bytes/s of reads and writes together over three arrays of ``num_bytes`` in all; the best of
    three patterns."""
    count = num_bytes // 12
    a, b, c = (native.op_ds.bench.Buffer(pool, 4 * count) for _ in range(3))
    patterns = {
        TRIAD_BYTES: lambda: pool.triad(a.address, b.address, c.address, 0.5, count),
        RESCALE_BYTES: lambda: pool.rescale(a.address, 0.999, count),
        2 * 4: lambda: pool.copy(a.address, b.address, 4 * count),
    }
    return max(moved * count / median_seconds(action, limit_s=limit_s / 3) for moved, action in patterns.items())


class Link:
    """Copies between an arena, pinned as in training, and the device; one lane for each
    direction."""

    def __init__(self, device: torch.device, pool: Any, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._arena = Arena(2 * num_bytes, pin=device.type == "cuda", pool=pool)
        self._arena.settle()
        self._host = [self._arena.take(num_bytes) for _ in range(2)]
        self._device = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._lanes = Lanes(device)
        # Two calls of copy_ at once need two threads where a copy is done when the call returns.
        self._threads = Crew(2, "ratel-copies")

    def down(self) -> None:
        """Copy from the host to the device."""
        with self._lanes.on("h2d"):
            self._device[0].copy_(self._host[0], non_blocking=True)

    def up(self) -> None:
        """Copy from the device to the host."""
        with self._lanes.on("d2h"):
            self._host[1].copy_(self._device[1], non_blocking=True)

    def both(self) -> None:
        for done in [self._threads.submit(self.down), self._threads.submit(self.up)]:
            done.result()

    def both_to_the_end(self) -> None:
        """Copy both ways and wait, in a thread that keeps the link busy: without waiting it would
        queue copies without end."""
        self.both()
        self._lanes.synchronize()

    def rates(self, limit_s: float) -> tuple[float, float, float]:
        """Bytes/s down, up, and of each direction while both run."""
        return tuple(self._num_bytes / median_seconds(action, limit_s=limit_s, settle=self._lanes.synchronize)
                     for action in (self.down, self.up, self.both))

    def close(self) -> None:
        self._threads.close()
        self._lanes.synchronize()
        self._arena.close()


def measure_device_memory(device: torch.device, num_bytes: int, limit_s: float) -> float:
    """Bytes/s of a kernel that reads one array and writes another."""
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    settle = Lanes(device).synchronize
    return 2 * num_bytes / median_seconds(lambda: torch.mul(source, 2.0, out=target), limit_s=limit_s, settle=settle)
