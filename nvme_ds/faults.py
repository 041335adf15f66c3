"""Faults for tests: what an engine does wrong on purpose."""

from __future__ import annotations

import errno as errno_module

from nvme_ds import native

_FAULT_BITS = {None: 0, "read": 1, "write": 2, "sync": 4, "any": 7}


def faults(*, max_delay_us: int = 0, seed: int = 0, fail_op: str | None = None, fail_after_n: int = 0, fail_count: int = 1,
           errno: int = errno_module.EIO, short_transfers: bool = False, flip_op: str | None = None, flip_after_n: int = 0,
           flip_count: int = 1, torn_after_n: int = 0, torn_count: int = 0, stall_op: str | None = None, stall_after_n: int = 0,
           direct_errno: int = 0) -> native.Faults:
    """The arguments of ``Engine.inject``, which are all off by default.

    What is random follows ``seed``. Operations are counted as they are handed to the kernel:
    ``request_bytes`` of a transfer at most, each continuation of a short one anew, a sync once per
    file. *op* is ``read``, ``write``, ``sync`` or ``any``; after *after_n* of them the next *count*
    are hit.

    max_delay_us: finished requests are held back at random. fail: they fail with ``errno``.
    short_transfers: about half of the requests are cut short. flip: one bit is inverted without a
    word, of a read in the memory, of a write in the file. torn: a write reports success, and only a
    prefix of it (a multiple of 512 bytes, or nothing) is in the file. stall: from then on they get
    no answer at all, until the next call of this function. direct_errno: what transfers with
    O_DIRECT fail with.
    """
    return native.Faults(
        seed=seed, max_delay_us=max_delay_us, short_transfers=short_transfers, fail_errno=errno,
        fail_op=_FAULT_BITS[fail_op], fail_after_n=fail_after_n, fail_count=fail_count if fail_op else 0,
        flip_op=_FAULT_BITS[flip_op], flip_after_n=flip_after_n, flip_count=flip_count if flip_op else 0,
        torn_after_n=torn_after_n, torn_count=torn_count, stall_op=_FAULT_BITS[stall_op],
        stall_after_n=stall_after_n, direct_errno=direct_errno)
