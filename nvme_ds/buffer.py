"""Page-aligned memory with an address, for callers without an allocator of their own."""

from __future__ import annotations

import ctypes
import mmap

HUGE_PAGE_BYTES = 2 << 20


class AlignedBuffer:
    """Anonymous memory: ``address`` for the engine, ``view`` (a writable memoryview of bytes) for
    Python."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        # Private, so that huge pages are possible: a 1 MiB request on 4 KiB pages is 256 segments,
        # more than some devices take at once.
        self._map = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= HUGE_PAGE_BYTES:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
