"""Page-aligned memory with an address, for callers without an allocator of their own."""

from __future__ import annotations

import ctypes
import mmap


class AlignedBuffer:
    """Anonymous memory: ``address`` for the engine, ``view`` (a writable memoryview of bytes) for Python."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._map = mmap.mmap(-1, num_bytes)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
