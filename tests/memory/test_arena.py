"""One region, laid out once; parts that begin as zeros; memory as the kernel counts it."""

import mmap
import threading
from pathlib import Path

import pytest
import torch

from ratel import native
from ratel.errors import RatelError
from ratel.memory import anonymous, arena, resident
from ratel.memory.anonymous import HUGE_PAGE_BYTES, PAGE_BYTES, Taken, anonymous_map, arena_in, region_bytes, touch
from ratel.memory.arena import Arena
from ratel.memory.resident import peak_bytes, reset_peak, resident_bytes, trim
from ratel.units import MIB

pytestmark = pytest.mark.native


@pytest.fixture
def pool() -> "native.op_ds.Pool":
    with native.op_ds.Pool(1) as threads:
        yield threads


def test_parts_follow_each_other_page_by_page_until_the_arena_is_used_up(pool) -> None:
    made = Arena(5 * PAGE_BYTES - 1, pin=False, pool=pool)
    assert made.num_bytes == made.free_bytes == 5 * PAGE_BYTES and made.address % HUGE_PAGE_BYTES == 0
    first, second = made.take(1), made.take_as(2048, torch.bfloat16)
    assert (first.numel(), first.dtype, second.numel(), second.dtype) == (1, torch.uint8, 2048, torch.bfloat16)
    assert first.data_ptr() == made.address and second.data_ptr() == made.address + PAGE_BYTES
    assert made.free_bytes == 3 * PAGE_BYTES and not made._is_laid_out.is_set()
    third = made.take(2 * PAGE_BYTES + 1)
    assert third.data_ptr() == made.address + 2 * PAGE_BYTES and made.free_bytes == 0 and made._is_laid_out.is_set()
    with pytest.raises(AssertionError, match="1 bytes, 4096 more|laid out for 20480 bytes, 4096 more"):
        made.take(1)
    made.settle()
    assert not third.any() and not made.pinned
    third.fill_(1)
    made.close()
    assert third.all(), "parts live as long as their tensors"
    assert Arena(0, pin=False, pool=pool).num_bytes == PAGE_BYTES


def test_all_of_it_is_touched_and_none_past_its_end(pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "TOUCHED_BYTES", 2 * MIB)
    touched: list[tuple[int, int]] = []

    class Noting:
        def touch(self, address: int, num_bytes: int) -> None:
            touched.append((address, num_bytes))

    made = Arena(5 * MIB, pin=False, pool=Noting())
    made.settle()
    assert touched == [(made.address, 2 * MIB), (made.address + 2 * MIB, 2 * MIB), (made.address + 4 * MIB, MIB)]
    made.close()


def test_one_that_is_closed_at_once_stops_touching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "TOUCHED_BYTES", MIB)
    begun, may_go, touched = threading.Event(), threading.Event(), []

    class Slow:
        def touch(self, address: int, num_bytes: int) -> None:
            touched.append(num_bytes)
            begun.set()
            assert may_go.wait(60)

    made = Arena(8 * MIB, pin=False, pool=Slow())
    assert begun.wait(60)
    threading.Timer(0.1, may_go.set).start()
    made.close()
    assert touched == [MIB] and made._bytes.numel() == 0 and made._made._done.is_set()


def test_one_that_is_abandoned_stays_mapped(pool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    monkeypatch.setattr(arena, "_never_freed", kept)
    made = Arena(MIB, pin=False, pool=pool)
    part = made.take(MIB)
    made.abandon()
    assert kept == [made] and made._bytes.numel() == MIB
    part.fill_(1)


def test_memory_that_is_there_already_is_taken(pool) -> None:
    taken = Taken(map=anonymous_map(region_bytes(MIB)), is_pinned=False)
    made = Arena(MIB, pin=False, pool=pool, memory=taken)
    made.take(MIB).fill_(7)
    begin, num_bytes = arena_in(taken.map)
    assert (begin, num_bytes) == (made.address, MIB)
    made.close()


def test_a_piece_is_as_large_as_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "MOST_PINNED_BYTES", 2)
    assert list(arena.pinned_pieces([1, 2, 3], 3)) == [(0, 2), (2, 3)]
    assert list(arena.pinned_pieces([1, 2], 2)) == [(0, 2)]


@pytest.mark.parametrize("answer", [0, 1, 2])
def test_memory_that_cannot_be_pinned_is_said_with_the_error(answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    class Runtime:
        def cudaHostRegister(self, *given: int) -> int:
            asked.append(given)
            return answer

        cudaHostUnregister = lambda self, address: asked.append((address,))

    monkeypatch.setattr(arena.torch.cuda, "cudart", Runtime)
    if answer:
        with pytest.raises(RatelError, match=rf"dram: CUDA could not pin 3.00 MiB of host memory \(error {answer}\)"):
            arena._register(4096, 3 * MIB)
    else:
        arena._register(4096, 3 * MIB)
    arena._unregister(4096)
    assert asked == [(4096, 3 * MIB, 0), (4096,)]


def test_the_kernels_count_is_in_kib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t   7 kB\nVmRSS:\t   5 kB\n")
    monkeypatch.setattr(resident, "_STATUS", tmp_path / "status")
    assert (resident_bytes(), peak_bytes()) == (5 * 1024, 7 * 1024)
    monkeypatch.setattr(resident, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")
    reset_peak()  # refused: peaks stay upper bounds
    monkeypatch.setattr(resident, "_CLEAR_REFS", tmp_path / "clear_refs")
    reset_peak()
    assert (tmp_path / "clear_refs").read_text() == "5"


@pytest.mark.parametrize("num_bytes", [0, 1, PAGE_BYTES, 3 * MIB + 1])
def test_a_region_has_room_for_the_arena_wherever_it_begins(num_bytes: int) -> None:
    region = anonymous_map(region_bytes(num_bytes))
    begin, size = arena_in(region)
    first = torch.frombuffer(region, dtype=torch.uint8).data_ptr()
    assert begin % HUGE_PAGE_BYTES == 0 and size >= max(num_bytes, PAGE_BYTES) and size % PAGE_BYTES == 0
    assert first <= begin and begin + size <= first + len(region) and size < num_bytes + 2 * PAGE_BYTES


def test_a_system_that_gives_nothing_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(anonymous.mmap, "mmap", refuse)
    with pytest.raises(RatelError, match="dram: the system gave no 3.00 MiB of memory .*Give a smaller --dram") as caught:
        anonymous_map(3 * MIB)
    assert caught.value.field == "dram"


def test_huge_pages_are_asked_for_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Region(mmap.mmap):
        def madvise(self, advice: int, *_: int) -> None:
            asked.append(advice)
            raise OSError(22, "no huge pages")

    monkeypatch.setattr(anonymous.mmap, "mmap", Region)
    assert len(anonymous_map(MIB)) == MIB and asked == [mmap.MADV_HUGEPAGE]


def test_memory_is_counted_when_it_is_touched(pool) -> None:
    region = anonymous_map(64 * MIB)
    before = resident_bytes()
    touch(pool, region, 32 * MIB, 32 * MIB)
    assert 24 * MIB < resident_bytes() - before < 56 * MIB
    region[-1] = 1
    reset_peak()
    peak = peak_bytes()
    assert peak >= resident_bytes() - 8 * MIB
    view = torch.frombuffer(region, dtype=torch.uint8)
    view.fill_(1)
    assert peak_bytes() - peak > 24 * MIB, "a peak is the most since it began anew"
    trim()
