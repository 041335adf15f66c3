"""Anonymous memory: address space first, pages when they are touched."""

import ctypes
import mmap
from dataclasses import dataclass

from ratel import native
from ratel.errors import RatelError
from ratel.units import MIB, align_up, format_bytes

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 * MIB

TOUCHED_BYTES = 256 * MIB
"""Bytes touched between two looks at whether the memory is still wanted: 60 ms on a machine with 16
cores."""

MOST_PINNED_BYTES = 64 << 30
"""The most bytes that are pinned in one call, which takes seconds; the number of calls costs
nothing beside that."""


def anonymous_map(num_bytes: int) -> mmap.mmap:
    """Raises RatelError where the system does not give it."""
    try:
        region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RatelError(f"the system gave no {format_bytes(num_bytes)} of memory ({error})", field="dram",
                         remedy="Give a smaller --dram, or free memory") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            region.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without transparent huge pages: plain pages give the same rates
    return region


def touch(pool: "native.op_ds.Pool", region: mmap.mmap, begin: int, num_bytes: int) -> None:
    """Make the kernel map a part of it; what is there stays."""
    view = ctypes.c_char.from_buffer(region)
    pool.touch(ctypes.addressof(view) + begin, num_bytes)


def region_bytes(num_bytes: int) -> int:
    """Bytes of address space for an arena of this size, which begins at a huge page."""
    return align_up(max(num_bytes, PAGE_BYTES), PAGE_BYTES) + HUGE_PAGE_BYTES


def arena_in(region: mmap.mmap) -> tuple[int, int]:
    """Address and bytes of the arena in a region of `region_bytes`."""
    begin = ctypes.addressof(ctypes.c_char.from_buffer(region))
    return align_up(begin, HUGE_PAGE_BYTES), len(region) - HUGE_PAGE_BYTES


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Memory for an arena; if it ``is_pinned``, then from the arena's first byte to its last."""

    map: mmap.mmap
    is_pinned: bool = False
