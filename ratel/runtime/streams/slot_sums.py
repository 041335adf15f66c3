"""Checksums of buffers that go to SSD as a whole and come back as a whole: what the blocks save for
backward."""

import torch

from ratel import native
from ratel.errors import DamagedError


class SlotSums:
    """One CRC-32 for each (block, micro-batch, group), in DRAM. Switched off, nothing is computed
    and nothing compared."""

    def __init__(self, pool: "native.op_ds.Pool", volume: "native.nvme_ds.Volume | None", *, enabled: bool) -> None:
        self._pool, self._volume, self._enabled = pool, volume, enabled
        self._sums: dict[tuple[int, int, str], int] = {}

    def record(self, key: tuple[int, int, str], buffer: torch.Tensor) -> None:
        """``buffer`` (uint8, CPU) is about to be written."""
        if self._enabled:
            self._sums[key] = self._compute(buffer)

    def verify(self, key: tuple[int, int, str], buffer: torch.Tensor, offset: int) -> None:
        """``buffer`` was read from ``offset`` of the volume. Raises DamagedError naming file, block
        and micro-batch."""
        if not self._enabled:
            return
        found, expected = self._compute(buffer), self._sums.pop(key)
        if found != expected:
            path, position = self._volume.locate(offset)
            what = f"{'what is kept inside' if key[2] else 'the input'} of block {key[0]}, micro-batch {key[1]}"
            raise DamagedError(f"is damaged at byte {position}: {what} has checksum {found:08x}, {expected:08x} was written",
                               path=path)

    def _compute(self, buffer: torch.Tensor) -> int:
        return int(self._pool.crc32(buffer.data_ptr(), buffer.numel(), buffer.numel())[0])
