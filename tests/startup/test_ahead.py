"""What a run begins before PyTorch is imported: memory for states, the GPU's context, its
libraries."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ratel import native, train
from ratel.config import TrainConfig
from ratel.errors import RatelError
from ratel.memory.anonymous import region_bytes
from ratel.memory.arena import Arena
from ratel.memory.resident import resident_bytes
from ratel.startup import ahead
from ratel.startup import arena_ahead
from ratel.startup import context_ahead
from ratel.startup import readahead
from ratel.units import GIB, MIB
from tests.support.ahead import asked_ahead, checkpoint  # noqa: F401
from tests.support.patience import patience, wait_until


@pytest.fixture
def pool() -> Iterator["native.op_ds.Pool"]:
    with native.op_ds.Pool(2) as threads:
        yield threads


@pytest.mark.native
@pytest.mark.parametrize("num_bytes", [3 * MIB, 40 * MIB, 90 * MIB])
def test_an_arena_takes_memory_that_was_mapped_ahead(num_bytes: int, pool: "native.op_ds.Pool",
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_ahead, "TOUCHED_BYTES", MIB)
    before = resident_bytes()
    arena_ahead.begin(64 * MIB, 2)
    wait_until(lambda: arena_ahead._current.touched_bytes >= 64 * MIB)
    with arena_ahead.paused() as held:
        assert held == 64 * MIB and resident_bytes() - held == pytest.approx(before, abs=16 * MIB)
    arena = Arena(num_bytes, pin=False, pool=pool, memory=arena_ahead.take(region_bytes(num_bytes)))
    part = arena.take(num_bytes)
    part[::4096] = 7  # beside the thread that maps the rest
    arena.settle()
    assert part[::4096].eq(7).all() and int(part.count_nonzero()) == part[::4096].numel()
    assert resident_bytes() == pytest.approx(before + num_bytes, abs=16 * MIB)
    assert arena_ahead.take(1) is None
    arena.close()


@pytest.mark.native
def test_mapping_ahead_ends_when_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_ahead, "TOUCHED_BYTES", MIB)
    arena_ahead.begin(1 << 62, 1)  # more than there is
    assert arena_ahead.take(1) is None
    arena_ahead.begin(8 << 30, 1)
    arena_ahead.drop()
    assert arena_ahead.take(1) is None and not any(t.name == "ratel-arena" for t in threading.enumerate())
    arena_ahead.begin(0, 1)
    assert arena_ahead.take(1) is None


@pytest.mark.native
def test_a_run_that_is_refused_gives_back_what_was_mapped_for_it(checkpoint: Path, tmp_path: Path,
                                                                 asked_ahead: list[int]) -> None:
    with pytest.raises(RatelError, match="nothing.txt"):
        train(str(checkpoint), str(tmp_path / "nothing.txt"), out=str(tmp_path / "out"), dtype="bf16", quiet=True)
    assert asked_ahead and arena_ahead._current is None
    assert not any(thread.name == "ratel-arena" for thread in threading.enumerate())


@pytest.mark.native
@pytest.mark.parametrize("dram", [None, 6 * GIB, 1 << 50])
def test_no_more_is_mapped_than_budget_and_machine_have(dram: int | None, checkpoint: Path, asked_ahead: list[int],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_STATES_PER_WEIGHT", 1 << 30)  # a large model
    monkeypatch.setattr(ahead, "available_memory", lambda: 10 * GIB)
    try:
        ahead.begin_ahead(TrainConfig(model=str(checkpoint), dram=dram))
    finally:
        ahead.end_ahead()
    assert asked_ahead == [min(dram or 9 * GIB, 9 * GIB) - 4 * GIB]


# --- pinned memory ----------------------------------------------------------------------------------------------------


class Pinned:
    """Stands for the driver: memory that is pinned, as address and bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: dict[int, int] = {}
        monkeypatch.setattr(context_ahead, "pin", self.pin)
        monkeypatch.setattr(context_ahead, "unpin", self.parts.pop)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)

    def pin(self, address: int, num_bytes: int) -> bool:
        self.parts[address] = num_bytes
        return True

    def cudaHostUnregister(self, address: int) -> None:
        del self.parts[address]


def mapped(num_bytes: int, *, pins: bool) -> None:
    """As much memory as an arena of this size takes, ahead."""
    arena_ahead.begin(region_bytes(num_bytes), 2, pins=pins)
    wait_until(lambda: arena_ahead._current.is_pinned if pins else arena_ahead._current.touched_bytes)


@pytest.mark.native
@pytest.mark.parametrize("num_bytes", [40 * MIB, 40 * MIB + 4096])
def test_an_arena_of_the_size_of_last_time_is_pinned_already(num_bytes: int, pool: "native.op_ds.Pool",
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = Pinned(monkeypatch)
    mapped(num_bytes, pins=True)
    arena = Arena(num_bytes, pin=False, pool=pool, memory=arena_ahead.take(region_bytes(num_bytes)))
    assert arena.pinned and pinned.parts == {arena.address: num_bytes}
    arena.settle()
    assert not arena.take(num_bytes).any()
    arena.close()
    assert not pinned.parts


@pytest.mark.native
@pytest.mark.parametrize("num_bytes", [30 * MIB, 50 * MIB])
def test_an_arena_of_another_size_pins_its_memory_itself(num_bytes: int, pool: "native.op_ds.Pool",
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = Pinned(monkeypatch)
    mapped(40 * MIB, pins=True)
    assert list(pinned.parts.values()) == [40 * MIB]
    arena = Arena(num_bytes, pin=False, pool=pool, memory=arena_ahead.take(region_bytes(num_bytes)))
    assert not pinned.parts and not arena.pinned
    arena.settle()
    assert not arena.take(num_bytes).any()
    arena.close()
    mapped(40 * MIB, pins=True)
    arena_ahead.drop()
    assert not pinned.parts


@pytest.mark.native
def test_what_measures_the_machine_has_it_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning keeps others from the driver for seconds. Who gives the memory back waits for it; a
    plan that counts memory does not."""
    begun, may_end, ended = (threading.Event() for _ in range(3))

    def pin(address: int, num_bytes: int) -> bool:
        begun.set()
        assert may_end.wait(patience(30))
        ended.set()
        return False

    monkeypatch.setattr(context_ahead, "pin", pin)
    arena_ahead.begin(region_bytes(4 * MIB), 1, pins=True)
    assert begun.wait(patience(30))
    with arena_ahead.paused() as held:
        assert held == region_bytes(4 * MIB) and not ended.is_set()
    threading.Timer(0.2, may_end.set).start()
    arena_ahead.drop()
    assert ended.is_set()
    arena_ahead.drop()  # there is nothing to be waited for


@pytest.mark.native
def test_what_the_driver_does_not_pin_is_left_to_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_ahead, "_current", None)  # nothing has made a context
    arena_ahead.begin(region_bytes(4 * MIB), 1, pins=True)
    assert not arena_ahead.take(region_bytes(4 * MIB)).is_pinned


@pytest.mark.native
def test_a_start_maps_and_pins_what_the_last_one_took(checkpoint: Path, asked_ahead: list[int],
                                                      monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = TrainConfig(model=str(checkpoint), dram=6 * GIB)

    def asked(config: TrainConfig) -> int:
        monkeypatch.setattr(readahead, "_current", None)
        ahead.begin_ahead(config)
        ahead.end_ahead()
        return asked_ahead.pop()

    guess = asked(config)
    ahead.remember_arena(config, 5 * MIB)
    assert asked(config) == region_bytes(5 * MIB) != guess
    assert asked(replace(config, lr=1.0, seed=3, steps=7)) == region_bytes(5 * MIB)
    assert asked(replace(config, batch_size=3)) == guess
    ahead.remember_arena(config, 1 << 60)  # more than there is now
    assert asked(config) == guess


@pytest.mark.gpu
def test_a_second_start_on_a_gpu_finds_context_and_memory_ready(checkpoint: Path, tmp_path: Path) -> None:
    """The command, in processes of their own: each start knows more, and all train the same."""
    found = []
    for number in range(3):
        out = tmp_path / str(number)
        command = [sys.executable, "-m", "ratel", "train", "--model", str(checkpoint), "--out", str(out), "--steps", "3", "--batch-size", "2",
                   "--seq-len", "32", "--device", "cuda", "--tier", "dram", "--dram", "8GiB", "--gpu-memory", "2GiB", "--deterministic",
                   "--eval-fraction", "0", "--no-export", "--quiet"]
        done = subprocess.run(command, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        phases = {phase["name"]: phase for phase in json.loads((out / "startup.json").read_text())["phases"]}
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append((phases, losses))
    assert all("context of the GPU" in phases for phases, _ in found)
    assert found[0][1] == found[1][1] == found[2][1] and len(found[0][1]) == 3
    assert "pinning memory ahead" not in found[0][0]
    assert found[2][0]["pinning memory ahead"]["bytes"] > 0 and "pinning memory" not in found[2][0]


@pytest.mark.native
def test_an_arena_that_is_closed_at_once_stops_mapping(pool: "native.op_ds.Pool") -> None:
    before = resident_bytes()
    Arena(4 << 30, pin=False, pool=pool).close()
    assert resident_bytes() - before < 1 << 30
