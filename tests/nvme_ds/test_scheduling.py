"""Order, depth, cap and the end of an engine. A bandwidth cap stretches times, so that slow
machines measure the same."""

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import nvme_ds
from nvme_ds import AlignedBuffer, Engine
from tests.support.engines import KIB, MIB
from tests.support.patience import patience

pytestmark = pytest.mark.native


def submit_many(engine: Engine, volume: nvme_ds.Volume, memory: AlignedBuffer, count: int, priority: int) -> list[int]:
    return [engine.submit_write(volume, i * 64 * KIB, memory.address, 64 * KIB, priority) for i in range(count)]


def num_done(engine: Engine, tickets: list[int]) -> int:
    return sum(engine.done(ticket) for ticket in tickets)


def test_urgent_reads_overtake_queued_writes(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, bandwidth_bps=4 * MIB) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", 2 * MIB), AlignedBuffer(128 * KIB)
        writes = submit_many(engine, volume, memory, 32, nvme_ds.WRITEBACK)
        engine.wait(engine.submit_read(volume, 0, memory.address + 64 * KIB, 64 * KIB, nvme_ds.WEIGHT))
        # 32 writes take half a second at this cap; the read waits for those already with the kernel
        # and goes next.
        assert num_done(engine, writes) < 16
        engine.wait_all(writes)


def test_classes_go_in_order(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, queue_depth=1, num_threads=1, bandwidth_bps=8 * MIB) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", 2 * MIB), AlignedBuffer(64 * KIB)
        first = submit_many(engine, volume, memory, 4, nvme_ds.WRITEBACK)  # busy while the rest is queued
        by_class = {priority: submit_many(engine, volume, memory, 2, priority) for priority in (4, 3, 2, 1, 0)}
        for priority in (0, 1, 2, 3):
            engine.wait_all(by_class[priority])
            later = [ticket for lower in range(priority + 1, 5) for ticket in by_class[lower]]
            assert num_done(engine, later) <= 1
        engine.wait_all(first + by_class[4])


def test_write_back_does_not_starve(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, queue_depth=1, num_threads=1, bandwidth_bps=16 * MIB) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", 8 * MIB), AlignedBuffer(64 * KIB)
        urgent = submit_many(engine, volume, memory, 60, nvme_ds.WEIGHT)
        engine.wait_all(submit_many(engine, volume, memory, 2, nvme_ds.WRITEBACK))
        assert num_done(engine, urgent) < 40
        engine.wait_all(urgent)


def test_background_traffic_gets_one_request_in_sixteen(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, queue_depth=1, num_threads=1, bandwidth_bps=16 * MIB) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", 8 * MIB), AlignedBuffer(64 * KIB)
        urgent = submit_many(engine, volume, memory, 60, nvme_ds.OPTIMIZER)
        engine.wait_all(submit_many(engine, volume, memory, 2, nvme_ds.BACKGROUND))
        # Two of them need 30 others to be passed over by; the first few of those went before they
        # were submitted.
        assert 30 <= num_done(engine, urgent) < 50
        engine.wait_all(urgent)
        engine.wait_all(submit_many(engine, volume, memory, 8, nvme_ds.BACKGROUND))


def test_low_classes_leave_slots_to_urgent_ones(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, queue_depth=8, num_threads=8) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", 2 * MIB), AlignedBuffer(64 * KIB)
        engine.inject(max_delay_us=30_000)
        engine.wait_all(submit_many(engine, volume, memory, 32, nvme_ds.WRITEBACK))
        assert engine.stats()["directories"][str(ssd_dir)]["max_in_flight"] == 7
        engine.wait_all(submit_many(engine, volume, memory, 32, nvme_ds.WEIGHT))
        assert engine.stats()["directories"][str(ssd_dir)]["max_in_flight"] == 8


def test_the_cap_holds_for_reads_and_writes_together(backend: str, ssd_dir: Path) -> None:
    cap_bps, num_bytes = 24 * MIB, 8 * MIB
    with Engine(backend=backend, request_bytes=64 * KIB, bandwidth_bps={str(ssd_dir): cap_bps}) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", num_bytes), AlignedBuffer(2 * num_bytes)
        begin_s = time.monotonic()
        engine.wait_all([engine.submit_write(volume, 0, memory.address, num_bytes, nvme_ds.WRITEBACK),
                         engine.submit_read(volume, 0, memory.address + num_bytes, num_bytes, nvme_ds.OPTIMIZER)])
        elapsed_s = time.monotonic() - begin_s
    assert 2 * num_bytes / elapsed_s <= 1.15 * cap_bps


def test_each_directory_has_its_own_cap(ssd_dir: Path) -> None:
    slow, fast = ssd_dir / "slow", ssd_dir / "fast"
    slow.mkdir(), fast.mkdir()
    with Engine(bandwidth_bps={str(slow): 8 * KIB}) as engine:  # minutes of it
        memory = AlignedBuffer(2 * MIB)
        volumes = [engine.create_volume([folder], "v", 2 * MIB) for folder in (slow, fast)]
        tickets = [engine.submit_write(volume, 0, memory.address, 2 * MIB, 0) for volume in volumes]
        engine.wait(tickets[1])
        assert not engine.done(tickets[0])


def test_wait_can_time_out_and_be_repeated(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, bandwidth_bps=4 * MIB) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", 2 * MIB), AlignedBuffer(2 * MIB)
        ticket = engine.submit_write(volume, 0, memory.address, 2 * MIB, 0)
        with pytest.raises(TimeoutError):
            engine.wait(ticket, timeout_s=0.05)
        engine.wait(ticket, timeout_s=patience(10))
        with pytest.raises(ValueError, match="waited for before"):
            engine.wait(ticket)


def test_ctrl_c_reaches_a_waiting_thread(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, bandwidth_bps=MIB // 32) as engine:  # two minutes of it
        volume, memory = engine.create_volume([ssd_dir], "v", 4 * MIB), AlignedBuffer(4 * MIB)
        ticket = engine.submit_write(volume, 0, memory.address, 4 * MIB, 0)
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            engine.wait(ticket)
        assert not engine.done(ticket)
        timer.join()


def test_close_ends_every_waiter(backend: str, ssd_dir: Path) -> None:
    engine = Engine(backend=backend, bandwidth_bps=MIB // 2)
    volume, memory = engine.create_volume([ssd_dir], "v", 8 * MIB), AlignedBuffer(8 * MIB)
    tickets = [engine.submit_write(volume, i * MIB, memory.address + i * MIB, MIB, nvme_ds.WRITEBACK) for i in range(8)]
    codes: list[int] = []

    def body(ticket: int) -> None:
        try:
            engine.wait(ticket)
            codes.append(0)
        except OSError as error:
            codes.append(error.errno)

    threads = [threading.Thread(target=body, args=(ticket,)) for ticket in tickets]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    engine.close()
    for thread in threads:
        thread.join(timeout=patience(5))
    assert len(codes) == 8
    assert set(codes) <= {0, errno.ECANCELED} and errno.ECANCELED in codes
    assert not any(os.path.exists(path) for path in volume.paths)


def test_a_closed_engine_refuses(ssd_dir: Path) -> None:
    engine = Engine()
    volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
    ticket = engine.submit_write(volume, 0, memory.address, MIB, 0)
    engine.close()
    engine.close()
    for call in (lambda: engine.wait(ticket), lambda: engine.done(ticket),
                 lambda: engine.create_volume([ssd_dir], "w", MIB),
                 lambda: engine.submit_read(volume, 0, memory.address, MIB, 0)):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.ECANCELED


def test_submit_waits_for_nothing(backend: str, ssd_dir: Path) -> None:
    """Many more requests than the device takes at once are handed over while it answers none."""
    with Engine(backend=backend) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(4096)
        engine.inject(stall_op="read")
        tickets = [engine.submit_read(volume, 0, memory.address, 4096, 0) for _ in range(500)]
        assert not any(map(engine.done, tickets))
        engine.inject()
        engine.wait_all(tickets)
