"""A device that stops answering: who notices, who is not mistaken for one, and that nothing waits
for it at the end."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import nvme_ds
from nvme_ds import AlignedBuffer, Engine, IoError, StallError
from tests.support.engines import KIB, MIB
from tests.support.patience import patience, wait_until

pytestmark = pytest.mark.native
SILENT_S = patience(0.1)
"""For which a device has not answered, and is taken to be dead: far more than a living one
takes."""


def test_stalled_requests_go_on_when_the_hook_is_turned_off(backend: str, ssd_dir: Path) -> None:
    data = os.urandom(MIB)
    with Engine(backend=backend, request_bytes=64 * KIB) as engine:
        volume, memory, copy = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB), AlignedBuffer(MIB)
        memory.view[:] = data
        engine.wait(engine.submit_write(volume, 0, memory.address, MIB, 0))
        engine.inject(stall_op="read", stall_after_n=2)
        reads = [engine.submit_read(volume, at, copy.address + at, 64 * KIB, 0) for at in range(0, MIB, 64 * KIB)]
        wait_until(lambda: sum(map(engine.done, reads)) == 2)
        with pytest.raises(TimeoutError):
            engine.wait(reads[-1], timeout_s=0.05)
        engine.inject(stall_op="read")  # replaces the hook, and stalls them again
        time.sleep(0.05)
        assert sum(map(engine.done, reads)) == 2 and engine.stats()["in_flight"] > 0
        engine.inject()
        engine.wait_all(reads)
        assert copy.view == data and engine.stats()["errors"] == 0


def test_other_kinds_go_on_meanwhile(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, stall_timeout_s=SILENT_S) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
        engine.inject(stall_op="write")
        write = engine.submit_write(volume, 0, memory.address, 64 * KIB, 0)
        for _ in range(5):
            engine.wait(engine.submit_read(volume, 0, memory.address + 64 * KIB, 64 * KIB, 0))
        volume.sync()
        assert not engine.done(write)
        engine.inject()
        engine.wait(write)


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_wait_names_the_file_and_can_be_repeated(backend: str, op: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, stall_timeout_s=SILENT_S) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
        engine.inject(stall_op=op)
        submit = engine.submit_read if op == "read" else engine.submit_write
        ticket, begin_s = submit(volume, 64 * KIB, memory.address, 4 * KIB, 0), time.monotonic()
        with pytest.raises(StallError, match="the device does not answer") as caught:
            engine.wait(ticket)
        assert time.monotonic() - begin_s >= SILENT_S
        error = caught.value
        assert (error.errno, error.filename, error.op) == (errno.ETIMEDOUT, volume.paths[0], op)
        assert (error.offset, error.num_bytes) == (64 * KIB, 4 * KIB)
        with pytest.raises(StallError):
            engine.wait(ticket)
        engine.inject()
        engine.wait(ticket)


def test_a_queued_request_of_a_silent_device_is_stuck_too(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, queue_depth=1, num_threads=1, stall_timeout_s=SILENT_S) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
        engine.inject(stall_op="write")
        write = engine.submit_write(volume, 0, memory.address, 4 * KIB, 0)
        read = engine.submit_read(volume, 0, memory.address, 4 * KIB, 0)
        with pytest.raises(StallError) as caught:
            engine.wait(read)
        assert caught.value.op == "read"
        engine.inject()
        engine.wait_all([write, read])


def test_wait_all_raises_at_once(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, stall_timeout_s=SILENT_S) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
        engine.inject(stall_op="any", stall_after_n=1)
        tickets = [engine.submit_read(volume, 0, memory.address + at, 4 * KIB, 0) for at in range(0, MIB, 8 * KIB)]
        with pytest.raises(StallError):
            engine.wait_all(tickets)
        assert engine.stats()["in_flight"] > 1, "it has not waited for one after the other"
        engine.inject()
        wait_until(lambda: engine.stats()["in_flight"] == 0)


def test_a_silent_device_is_no_fault_of_another(backend: str, ssd_dir: Path) -> None:
    (ssd_dir / "dead").mkdir(), (ssd_dir / "slow").mkdir()
    with Engine(backend=backend, stall_timeout_s=SILENT_S, request_bytes=64 * KIB,
                bandwidth_bps={str(ssd_dir / "slow"): 768 * KIB / (4 * SILENT_S)}) as engine:
        dead = engine.create_volume([ssd_dir / "dead"], "v", MIB)
        slow = engine.create_volume([ssd_dir / "slow"], "v", MIB)
        memory = AlignedBuffer(MIB)
        engine.inject(stall_op="write")
        stuck = engine.submit_write(dead, 0, memory.address, 4 * KIB, 0)
        engine.wait(engine.submit_read(slow, 0, memory.address, 768 * KIB, 0))
        with pytest.raises(StallError) as caught:
            engine.wait(stuck)
        assert caught.value.filename == dead.paths[0]
        engine.inject()
        engine.wait(stuck)


def test_a_striped_ticket_names_the_file_that_is_stuck(backend: str, ssd_dir: Path) -> None:
    (ssd_dir / "a").mkdir(), (ssd_dir / "b").mkdir()
    with Engine(backend=backend, stall_timeout_s=SILENT_S) as engine:
        volume = engine.create_volume([ssd_dir / "a", ssd_dir / "b"], "v", 128 * KIB, stripe_bytes=64 * KIB)
        memory = AlignedBuffer(128 * KIB)
        engine.inject(stall_op="read", stall_after_n=1)
        ticket = engine.submit_read(volume, 0, memory.address, 128 * KIB, 0)
        with pytest.raises(StallError) as caught:
            engine.wait(ticket)
        done = [folder for folder, entry in engine.stats()["directories"].items() if entry["reads"]]
        assert len(done) == 1 and caught.value.filename in volume.paths
        assert not caught.value.filename.startswith(done[0])
        engine.inject()
        engine.wait(ticket)


def test_a_cap_is_not_silence(backend: str, ssd_dir: Path) -> None:
    """Each request waits for the cap three times as long as the time-out."""
    with Engine(backend=backend, request_bytes=256 * KIB, bandwidth_bps=256 * KIB / (3 * SILENT_S), stall_timeout_s=SILENT_S) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
        engine.wait(engine.submit_write(volume, 0, memory.address, 768 * KIB, 0))


def test_a_long_queue_is_not_silence(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, queue_depth=1, num_threads=1, request_bytes=64 * KIB, stall_timeout_s=SILENT_S) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", 2 * MIB), AlignedBuffer(2 * MIB)
        engine.inject(max_delay_us=int(SILENT_S / 6 * 1e6), seed=1)
        begin_s = time.monotonic()
        engine.wait(engine.submit_write(volume, 0, memory.address, 2 * MIB, 0))
        assert time.monotonic() - begin_s > 1.5 * SILENT_S, "too fast to show anything"


def test_sync_notices(backend: str, ssd_dir: Path) -> None:
    with Engine(backend=backend, stall_timeout_s=SILENT_S) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
        engine.wait(engine.submit_write(volume, 0, memory.address, MIB, 0))
        engine.inject(stall_op="sync")
        with pytest.raises(StallError) as caught:
            volume.sync()
        assert (caught.value.op, caught.value.filename) == ("sync", volume.paths[0])
        engine.inject()
        volume.sync()


def test_close_does_not_wait_for_ever_and_may_be_repeated(backend: str, ssd_dir: Path) -> None:
    engine = Engine(backend=backend, stall_timeout_s=SILENT_S)
    volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
    engine.inject(stall_op="write")
    engine.submit_write(volume, 0, memory.address, MIB, 0)
    wait_until(lambda: engine.stats()["in_flight"] > 0)
    with pytest.raises(TimeoutError, match="after 0.1 s"):
        engine.close(timeout_s=0.1)
    with pytest.raises(TimeoutError, match=f"none was answered for {SILENT_S:g} s"):
        engine.close()
    engine.inject()
    engine.close()
    assert os.listdir(ssd_dir) == []


def test_abandon_releases_everyone_but_the_device(backend: str, ssd_dir: Path) -> None:
    engine, codes = Engine(backend=backend), []
    volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
    engine.inject(stall_op="read")
    ticket = engine.submit_read(volume, 0, memory.address, MIB, 0)

    def body() -> None:
        with pytest.raises(IoError) as caught:
            engine.wait(ticket)
        codes.append(caught.value.errno)

    waiter = threading.Thread(target=body)
    waiter.start()
    wait_until(lambda: engine.stats()["in_flight"] > 0)
    with pytest.raises(TimeoutError):
        engine.close(timeout_s=0.05)
    engine.abandon()
    waiter.join(timeout=patience(5))
    assert codes == [errno.ECANCELED]
    engine.abandon(), engine.close(), volume.close()
    assert os.path.exists(volume.paths[0]), "removing a file may hang as well"
    for call in (volume.sync, lambda: engine.wait(ticket),
                 lambda: engine.submit_read(volume, 0, memory.address, MIB, 0)):
        with pytest.raises(IoError) as caught:
            call()
        assert caught.value.errno == errno.ECANCELED


def test_abandon_while_another_thread_closes(backend: str, ssd_dir: Path) -> None:
    engine = Engine(backend=backend)
    volume, memory = engine.create_volume([ssd_dir], "v", MIB), AlignedBuffer(MIB)
    engine.inject(stall_op="read")
    engine.submit_read(volume, 0, memory.address, MIB, 0)
    wait_until(lambda: engine.stats()["in_flight"] > 0)
    closer = threading.Thread(target=engine.close)
    closer.start()
    time.sleep(0.05)
    engine.abandon()
    closer.join(timeout=patience(5))
    assert not closer.is_alive() and os.path.exists(volume.paths[0])


SCRIPT = """
import sys, nvme_ds
engine = nvme_ds.Engine(backend=sys.argv[1], stall_timeout_s=float(sys.argv[5]))
volume, memory = engine.create_volume([sys.argv[2]], "v", 1 << 20), nvme_ds.AlignedBuffer(1 << 20)
engine.register_buffer(memory.address, 1 << 20)
engine.inject(stall_op=sys.argv[3])
try:
    if sys.argv[3] == "sync":
        volume.sync()
    else:
        engine.wait(engine.submit_read(volume, 0, memory.address, 1 << 20, 0))
except nvme_ds.StallError:
    pass
if sys.argv[4] == "abandon":
    try:
        engine.close(timeout_s=0.1)
    except TimeoutError:
        engine.abandon()
"""


@pytest.mark.parametrize("op", ["read", "sync"])
@pytest.mark.parametrize("how", ["abandon", "drop"])
def test_the_process_ends(backend: str, op: str, how: str, ssd_dir: Path) -> None:
    """With its engine given up, and with one that is only dropped after its device fell silent."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, backend, str(ssd_dir), op, how, str(SILENT_S)], capture_output=True,
                          text=True, timeout=patience(60), cwd=Path(nvme_ds.__file__).parents[1])
    assert done.returncode == 0 and done.stderr == "", done.stderr
