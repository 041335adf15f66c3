"""Pinning in pieces, with a stand-in for the call that does it: borders lie between parts, and a
failure leaves nothing pinned."""

from collections.abc import Iterator

import pytest
import torch

from ratel import native
from ratel.errors import RatelError
from ratel.memory import anonymous, arena
from ratel.memory.arena import Arena
from ratel.startup import arena_ahead
from tests.support.patience import wait_until

pytestmark = pytest.mark.unit
PAGE, MOST = 4096, 64 * 4096


class Driver:
    """Registers what it is given, but no more in one call than it can, and nothing that
    overlaps."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.regions: dict[int, int] = {}
        self.calls, self._fails_at = [], fails_at

    def register(self, address: int, num_bytes: int) -> None:
        assert num_bytes <= MOST and all(address >= a + n or address + num_bytes <= a for a, n in self.regions.items())
        if len(self.regions) == self._fails_at:
            raise RatelError("could not be pinned", field="dram")
        self.regions[address] = num_bytes
        self.calls.append(("register", address))

    def unregister(self, address: int) -> None:
        del self.regions[address]
        self.calls.append(("unregister", address))

    def holds(self, part: torch.Tensor) -> bool:
        """Whether a copy of the whole part is legal: its memory lies in one region."""
        begin, end = part.data_ptr(), part.data_ptr() + part.numel()
        return any(address <= begin and end <= address + count for address, count in self.regions.items())


@pytest.fixture
def pool() -> Iterator["native.op_ds.Pool"]:
    with native.op_ds.Pool(1) as threads:
        yield threads


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Driver:
    stand_in = Driver(getattr(request, "param", None))
    monkeypatch.setattr(arena, "_register", stand_in.register)
    monkeypatch.setattr(arena, "_unregister", stand_in.unregister)
    monkeypatch.setattr(arena, "MOST_PINNED_BYTES", MOST)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return stand_in


@pytest.mark.parametrize("pages", [5, 64])
def test_what_is_pinned_in_one_piece_waits_for_no_layout(pages: int, driver: Driver, pool: "native.op_ds.Pool") -> None:
    """Where its parts will lie matters only if borders have to lie between them."""
    memory = Arena(pages * PAGE, pin=True, pool=pool)
    wait_until(lambda: sum(driver.regions.values()) == pages * PAGE)
    assert memory.free_bytes == pages * PAGE
    memory.close()


def test_more_than_one_piece_waits_for_the_layout(driver: Driver, pool: "native.op_ds.Pool", monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    pieces = arena.pinned_pieces
    monkeypatch.setattr(arena, "pinned_pieces", lambda ends, size: asked.append(list(ends)) or pieces(ends, size))
    memory = Arena(65 * PAGE, pin=True, pool=pool)
    for count in (40, 25):
        memory.take(count * PAGE)
    memory.settle()
    assert asked == [[40 * PAGE, 65 * PAGE]]
    memory.close()


@pytest.mark.parametrize("pages", [[200], [1] * 200, [30, 40, 64, 1, 63, 2, 0, 64], [64, 64, 64], [5]])
def test_every_part_lies_in_one_piece(pages: list[int], driver: Driver, pool: "native.op_ds.Pool",
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    if max(pages) > 64:
        pages = [64, *pages[1:], 64]
    memory = Arena(sum(pages) * PAGE, pin=True, pool=pool)
    parts = [memory.take(count * PAGE) for count in pages]
    memory.settle()
    assert memory.pinned and sum(driver.regions.values()) == sum(pages) * PAGE
    assert all(driver.holds(part) for part in parts if part.numel())
    assert len(driver.regions) >= -(-sum(pages) // 64)
    memory.close()
    assert not driver.regions and not memory.pinned


@pytest.mark.parametrize("driver", [2], indirect=True)
def test_a_piece_that_fails_undoes_the_others_in_order(driver: Driver, pool: "native.op_ds.Pool") -> None:
    memory = Arena(200 * PAGE, pin=True, pool=pool)
    for _ in range(4):
        memory.take(50 * PAGE)
    with pytest.raises(RatelError, match="could not be pinned"):
        memory.settle()
    pinned = [address for what, address in driver.calls if what == "register"]
    assert [address for what, address in driver.calls if what == "unregister"] == pinned[::-1] and len(pinned) == 2
    assert not driver.regions and not memory.pinned
    memory.close()


def test_an_arena_that_is_given_up_before_it_is_laid_out_ends(driver: Driver, pool: "native.op_ds.Pool") -> None:
    memory = Arena(200 * PAGE, pin=True, pool=pool)
    memory.take(50 * PAGE)
    memory.close()
    assert not driver.calls


def test_ahead_nothing_is_pinned_that_takes_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(arena_ahead.context_ahead, "pin", lambda address, count: asked.append(count) or True)
    monkeypatch.setattr(arena_ahead.context_ahead, "unpin", lambda address: None)
    monkeypatch.setattr(arena_ahead, "MOST_PINNED_BYTES", 8 << 20)
    for size, is_pinned in ((4 << 20, True), (16 << 20, False)):
        arena_ahead.begin(anonymous.region_bytes(size), 1, pins=True)
        arena_ahead._current._thread.join(60)
        assert arena_ahead.take(anonymous.region_bytes(size)).is_pinned is is_pinned
    assert len(asked) == 1
