"""One pinned region of host memory, reserved up front and laid out once.

Anonymous memory (transparent huge pages where the kernel gives them), touched by several threads,
then registered with CUDA. The kernel clears 4 to 5 GB/s, so a thread of the arena's own does both
while its parts are handed out and filled: fresh memory is zero, and whoever writes to a page first
maps it. Registering own memory is exact to the page, where a caching pinned allocator rounds each
request up to a power of two, and several times faster than asking CUDA for pinned memory.

Some drivers register no region of 512 GiB or more, so it is done in pieces of 64 GiB at most. A
copy's host memory must lie in one registered region: pieces end where parts do, and no copy is of
more than a part.
"""

import threading
from collections.abc import Iterator, Sequence

import torch

from ratel import native
from ratel.errors import RatelError
from ratel.memory.anonymous import MOST_PINNED_BYTES, PAGE_BYTES, TOUCHED_BYTES, Taken, anonymous_map, arena_in, region_bytes
from ratel.memory.jobs import in_thread
from ratel.trace import phases
from ratel.units import align_up, format_bytes


class Arena:
    """Hands out parts of the region until it is used up; parts live as long as the arena, and begin
    as zeros.

    They can be used at once. Only after ``settle`` is their memory there for certain, and pinned if
    ``pin``.
    """

    def __init__(self, num_bytes: int, *, pin: bool, pool: "native.op_ds.Pool", memory: Taken | None = None) -> None:
        """``memory``: to be used instead of new one, zero, of `region_bytes`."""
        self.num_bytes = align_up(max(num_bytes, PAGE_BYTES), PAGE_BYTES)
        self._map = memory.map if memory else anonymous_map(region_bytes(num_bytes))
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        skip = arena_in(self._map)[0] - whole.data_ptr()
        self._bytes = whole[skip : skip + self.num_bytes]
        self._ends: list[int] = []
        """Where each of the parts that were handed out ends."""
        self._is_laid_out = threading.Event()
        self._pinned_at: list[int] = [self.address] if memory is not None and memory.is_pinned else []
        self._given_up = threading.Event()
        self._made = in_thread("ratel-arena", self._make, pool, torch.cuda.current_device() if pin else None)

    @property
    def pinned(self) -> bool:
        """Whether all of it is, or will be undone."""
        return bool(self._pinned_at)

    @property
    def _cursor(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def address(self) -> int:
        return self._bytes.data_ptr()

    @property
    def free_bytes(self) -> int:
        return self.num_bytes - self._cursor

    def take(self, num_bytes: int) -> torch.Tensor:
        """The next part, page aligned, as a uint8 tensor."""
        size = align_up(num_bytes, PAGE_BYTES)
        assert size <= self.free_bytes, f"the arena was laid out for {self.num_bytes} bytes, {size} more asked"
        part = self._bytes[self._cursor : self._cursor + num_bytes]
        self._ends.append(self._cursor + size)
        if not self.free_bytes:
            self._is_laid_out.set()
        return part

    def take_as(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        return self.take(num_elements * dtype.itemsize).view(dtype)

    def settle(self) -> None:
        """Wait until the memory is there. Raises RatelError if CUDA does not pin it."""
        self._made.result()

    def _make(self, pool: "native.op_ds.Pool", device: int | None) -> None:
        if self.pinned:  # ahead, when all of it was mapped
            return
        for begin in range(0, self.num_bytes, TOUCHED_BYTES):
            if self._given_up.is_set():
                return
            pool.touch(self.address + begin, min(TOUCHED_BYTES, self.num_bytes - begin))
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own
            if self.num_bytes > MOST_PINNED_BYTES:
                self._is_laid_out.wait()
            if not self._given_up.is_set():
                begin_s = phases.age_s()
                self._pin(list(pinned_pieces(self._ends, self.num_bytes)))
                phases.note("pinning memory", begin_s, bytes=self.num_bytes)

    def _pin(self, pieces: list[tuple[int, int]]) -> None:
        """Pin all of the pieces, or none."""
        pinned: list[int] = []
        try:
            for begin, end in pieces:
                _register(self.address + begin, end - begin)
                pinned.append(self.address + begin)
        except BaseException:
            for address in reversed(pinned):
                _unregister(address)
            raise
        self._pinned_at = pinned

    def abandon(self) -> None:
        """Instead of ``close``, where transfers are not known to be over: the memory stays as it
        is."""
        self._give_up()
        keep_mapped(self)

    def close(self) -> None:
        """Unregister. The memory itself goes when the last tensor over it does."""
        self._give_up()
        while self._pinned_at:
            _unregister(self._pinned_at.pop())
        self._bytes = self._bytes[:0]

    def _give_up(self) -> None:
        self._given_up.set()
        self._is_laid_out.set()
        self._made.wait()


def keep_mapped(memory: object) -> None:
    """Keep memory mapped until the process ends: a device that has stopped answering may still
    write into it."""
    _never_freed.append(memory)


_never_freed: list[object] = []


def pinned_pieces(ends: Sequence[int], num_bytes: int) -> Iterator[tuple[int, int]]:
    """Begin and end of what is pinned together: as many parts, which end at ``ends``, as may be; a
    larger one by itself."""
    begin = last = 0
    if num_bytes > MOST_PINNED_BYTES:
        for end in ends:
            if end - begin > MOST_PINNED_BYTES and last > begin:
                yield begin, last
                begin = last
            last = end
    yield begin, num_bytes


def _register(address: int, num_bytes: int) -> None:
    result = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
    if int(result) != 0:
        raise RatelError(f"CUDA could not pin {format_bytes(num_bytes)} of host memory (error {int(result)})",
                         field="dram", remedy="Give a smaller --dram, or raise the limit on locked memory")


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
