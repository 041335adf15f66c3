"""Data through the engine: bitwise round trips, the layout on disk, and random traffic against a
model in memory."""

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import nvme_ds
from nvme_ds import AlignedBuffer, Engine, Volume
from nvme_ds.layout import stripe_pattern
from tests.support.engines import KIB, MIB, directories

pytestmark = pytest.mark.native


def write(engine: Engine, volume: Volume, offset: int, data: bytes) -> None:
    buffer = AlignedBuffer(len(data))
    buffer.view[:] = data
    engine.wait(engine.submit_write(volume, offset, buffer.address, len(data), nvme_ds.WRITEBACK))


def read(engine: Engine, volume: Volume, offset: int, num_bytes: int) -> bytes:
    buffer = AlignedBuffer(num_bytes)
    engine.wait(engine.submit_read(volume, offset, buffer.address, num_bytes, nvme_ds.WEIGHT))
    return bytes(buffer.view)


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [1, 1, 1], [4, 2, 1]])
@pytest.mark.parametrize("num_bytes", [4 * KIB, 64 * KIB, MIB + 12 * KIB, 3 * MIB - 4 * KIB])
def test_round_trip(backend: str, ssd_dir: Path, weights: list[float], num_bytes: int) -> None:
    data = os.urandom(num_bytes)
    with Engine(backend=backend, queue_depth=4, request_bytes=128 * KIB) as engine:
        volume = engine.create_volume(directories(ssd_dir, len(weights)), "v", num_bytes, 64 * KIB, weights)
        write(engine, volume, 0, data)
        assert read(engine, volume, 0, num_bytes) == data
        middle = num_bytes // 2 // 4096 * 4096
        assert read(engine, volume, middle, num_bytes - middle) == data[middle:]


def test_files_hold_the_stripes_of_the_pattern(backend: str, ssd_dir: Path) -> None:
    stripe_bytes, weights, data = 16 * KIB, [3, 2], os.urandom(23 * 16 * KIB + 4 * KIB)
    with Engine(backend=backend, request_bytes=64 * KIB) as engine:
        volume = engine.create_volume(directories(ssd_dir, 2), "v", len(data), stripe_bytes, weights, keep=True)
        write(engine, volume, 0, data)
        volume.sync()
    expected, pattern = [b"", b""], stripe_pattern(weights)
    for number, begin in enumerate(range(0, len(data), stripe_bytes)):
        expected[pattern[number % len(pattern)]] += data[begin:begin + stripe_bytes]
    assert [Path(path).read_bytes() for path in volume.paths] == expected
    for offset in (0, stripe_bytes - 1, stripe_bytes, 7 * stripe_bytes + 5, len(data) - 1):
        path, position = volume.locate(offset)
        assert Path(path).read_bytes()[position] == data[offset]


def test_a_kept_volume_opens_again_and_others_are_removed(backend: str, ssd_dir: Path) -> None:
    folders, data = directories(ssd_dir, 2), os.urandom(MIB)
    with Engine(backend=backend) as engine:
        kept = engine.create_volume(folders, "kept", MIB, 64 * KIB, keep=True)
        gone = engine.create_volume(folders, "gone", MIB, 64 * KIB)
        write(engine, kept, 0, data)
        kept.close()
        assert read(engine, engine.open_volume(folders, "kept", MIB, 64 * KIB), 0, MIB) == data
    assert all(os.path.exists(path) for path in kept.paths)
    assert not any(os.path.exists(path) for path in gone.paths)


def test_another_layout_is_refused(ssd_dir: Path) -> None:
    with Engine() as engine:
        engine.create_volume([ssd_dir], "v", MIB, keep=True).close()
        with pytest.raises(OSError, match="made with another one"):
            engine.open_volume([ssd_dir], "v", MIB // 2)
        engine.open_volume([ssd_dir], "v", MIB).close(unlink=True)
    assert os.listdir(ssd_dir) == []


def test_files_in_use_are_refused(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend) as engine:
        volume = engine.create_volume([ssd_dir], "v", MIB)
        write(engine, volume, 0, data := os.urandom(MIB))
        with pytest.raises(OSError, match="in use"):
            engine.create_volume([ssd_dir], "v", MIB)
        assert read(engine, volume, 0, MIB) == data
        volume.close()
        engine.create_volume([ssd_dir], "v", MIB)


def test_registered_memory_gives_the_same_bytes(backend: str, ssd_dir: Path) -> None:
    memory, data = AlignedBuffer(2 * MIB), os.urandom(MIB)
    with Engine(backend=backend, request_bytes=64 * KIB) as engine:
        engine.register_buffer(memory.address, memory.num_bytes)
        volume = engine.create_volume([ssd_dir], "v", MIB)
        memory.view[:MIB] = data
        engine.wait(engine.submit_write(volume, 0, memory.address, MIB, nvme_ds.WRITEBACK))
        engine.wait(engine.submit_read(volume, 0, memory.address + MIB, MIB, nvme_ds.WEIGHT))
        assert memory.view[MIB:] == data
        assert read(engine, volume, 0, MIB) == data, "memory outside of the registered region"
        stats = engine.stats()
        if stats["fixed_buffers"] == "on":
            assert stats["fixed_ops"] == 32
        else:
            assert stats["fixed_ops"] == 0 and stats["fixed_buffers"].startswith("off: ")
        engine.unregister_buffer(memory.address)
        assert read(engine, volume, 0, MIB) == data


def test_a_request_may_leave_the_registered_memory(ssd_dir: Path) -> None:
    memory, data = AlignedBuffer(256 * KIB), os.urandom(256 * KIB)
    with Engine(request_bytes=64 * KIB) as engine:
        engine.register_buffer(memory.address + 32 * KIB, 96 * KIB)
        volume = engine.create_volume([ssd_dir], "v", 256 * KIB)
        write(engine, volume, 0, data)
        engine.wait(engine.submit_read(volume, 0, memory.address, 256 * KIB, nvme_ds.WEIGHT))
        assert memory.view == data
        if engine.stats()["fixed_buffers"] == "on":
            assert engine.stats()["fixed_ops"] == 1


class Region:
    """A range of a volume that one thread owns, with a model of its bytes."""

    def __init__(self, engine: Engine, volume: Volume, offset: int, num_bytes: int, seed: int) -> None:
        self.engine, self.volume, self.offset, self.random = engine, volume, offset, random.Random(seed)
        self.memory, self.model = AlignedBuffer(num_bytes), bytearray(self.random.randbytes(num_bytes))
        self.memory.view[:] = self.model
        self.wait_shuffled([self.start(nvme_ds.Engine.submit_write, 0, num_bytes)])

    def start(self, submit, begin: int, end: int) -> int:
        priority = self.random.randrange(5)
        return submit(self.engine, self.volume, self.offset + begin, self.memory.address + begin, end - begin, priority)

    def wait_shuffled(self, tickets: list[int]) -> None:
        self.random.shuffle(tickets)
        for ticket in tickets:
            self.engine.wait(ticket)

    def round(self) -> None:
        """Cut the region at random; write new bytes to some pieces, read the others, all in flight
        at once; compare."""
        pages = len(self.model) // 4096
        cuts = [0, *sorted(self.random.sample(range(1, pages), 12)), pages]
        tickets = []
        for begin, end in zip([cut * 4096 for cut in cuts], [cut * 4096 for cut in cuts[1:]]):
            fresh = self.random.randbytes(end - begin)
            self.memory.view[begin:end] = fresh
            if self.random.random() < 0.5:
                self.model[begin:end] = fresh
                tickets.append(self.start(nvme_ds.Engine.submit_write, begin, end))
            else:
                tickets.append(self.start(nvme_ds.Engine.submit_read, begin, end))
        self.wait_shuffled(tickets)
        assert self.memory.view == self.model


@pytest.fixture
def failures() -> Iterator[list[BaseException]]:
    """What threads of a test raised; the test fails with the first of it."""
    caught: list[BaseException] = []
    yield caught
    if caught:
        raise caught[0]


@pytest.mark.parametrize("direct", ["auto", "off"])
def test_random_traffic_from_several_threads(backend: str, direct: str, ssd_dir: Path,
                                             failures: list[BaseException]) -> None:
    region_bytes, num_threads = 512 * KIB, 4
    with Engine(backend=backend, queue_depth=6, request_bytes=32 * KIB) as engine:
        volume = engine.create_volume(directories(ssd_dir, 3), "v", region_bytes * num_threads, 16 * KIB, [3, 2, 1],
                                      direct=direct)
        engine.inject(max_delay_us=800, seed=7, short_transfers=True)

        def body(number: int) -> None:
            try:
                region = Region(engine, volume, number * region_bytes, region_bytes, seed=number)
                for _ in range(12):
                    region.round()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=body, args=(number,)) for number in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()
        assert stats["tickets"] == stats["queued"] == stats["in_flight"] == stats["errors"] == 0


def test_injected_delays_change_the_order_of_completion(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, num_threads=8) as engine:
        volume = engine.create_volume([ssd_dir], "v", MIB)
        engine.inject(max_delay_us=40_000, seed=3)
        memory = AlignedBuffer(MIB)
        tickets = [engine.submit_write(volume, i * 64 * KIB, memory.address, 64 * KIB, 0) for i in range(8)]
        order: list[int] = []
        while len(order) < len(tickets):
            order += [ticket for ticket in tickets if ticket not in order and engine.done(ticket)]
        engine.wait_all(tickets)
    assert order != sorted(order)


def process_io_bytes() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


def test_counters_agree_with_the_kernel(backend: str, ssd_dir: Path) -> None:
    num_bytes = 24 * MIB
    with Engine(backend=backend) as engine:
        volume = engine.create_volume(directories(ssd_dir, 2), "v", num_bytes)
        if not volume.direct or not os.path.exists("/proc/self/io"):
            pytest.skip("needs O_DIRECT and per-process I/O accounting")
        memory = AlignedBuffer(num_bytes)
        # Once before counting: the first write to allocated space comes with metadata of its own.
        engine.wait(engine.submit_write(volume, 0, memory.address, num_bytes, 3))
        engine.reset_stats()
        before = process_io_bytes()
        engine.wait(engine.submit_write(volume, 0, memory.address, num_bytes, 3))
        engine.wait(engine.submit_read(volume, 0, memory.address, num_bytes, 0))
        after, stats = process_io_bytes(), engine.stats()
        assert stats["bytes_read"] == stats["bytes_written"] == num_bytes
        assert [entry["bytes_read"] for entry in stats["directories"].values()] == [num_bytes // 2] * 2
        assert 0 < max(entry["busy_s"] for entry in stats["directories"].values()) <= stats["busy_s"]
        if after["read_bytes"] == before["read_bytes"]:
            pytest.skip("this file system is not accounted to a disk")
        for key, counted in (("read_bytes", num_bytes), ("write_bytes", num_bytes)):
            assert counted <= after[key] - before[key] <= counted * 1.05
