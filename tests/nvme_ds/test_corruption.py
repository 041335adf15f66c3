"""Silent corruption on demand: what the hook flips and tears is exactly what it says, so that
checks can be tested."""

import os
from pathlib import Path

import pytest

import nvme_ds
from nvme_ds import AlignedBuffer, Engine, Volume
from tests.support.engines import KIB

pytestmark = pytest.mark.native
REQUEST_BYTES, NUM_BYTES = 64 * KIB, 512 * KIB


def ordered(backend: str) -> Engine:
    """One request after the other, so that the hook counts them in the order of their offsets."""
    return Engine(backend=backend, queue_depth=1, num_threads=1, request_bytes=REQUEST_BYTES)


def transfer(submit, volume: Volume, memory: AlignedBuffer) -> None:
    engine = submit.__self__
    engine.wait(submit(volume, 0, memory.address, memory.num_bytes, nvme_ds.WEIGHT))


def filled(data: bytes) -> AlignedBuffer:
    memory = AlignedBuffer(len(data))
    memory.view[:] = data
    return memory


def flipped_bits(got: bytes | memoryview, wanted: bytes) -> list[int]:
    return [8 * at + bit for at, (a, b) in enumerate(zip(bytes(got), wanted, strict=True)) if a != b
            for bit in range(8) if (a ^ b) >> bit & 1]


@pytest.mark.parametrize("registered", [False, True])
def test_a_read_gets_one_wrong_bit_and_the_file_is_right(backend: str, registered: bool, ssd_dir: Path) -> None:
    data, seen = os.urandom(NUM_BYTES), []
    with ordered(backend) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", NUM_BYTES), AlignedBuffer(NUM_BYTES)
        if registered:
            engine.register_buffer(memory.address, NUM_BYTES)
        transfer(engine.submit_write, volume, filled(data))
        for seed in (1, 1, 2):
            engine.inject(flip_op="read", flip_after_n=3, seed=seed)
            transfer(engine.submit_read, volume, memory)
            seen.append(flipped_bits(memory.view, data))
            transfer(engine.submit_read, volume, memory)
            assert memory.view == data, "more than one was flipped, or the file was"
        assert engine.stats()["errors"] == 0
    assert all(len(bits) == 1 and bits[0] // (8 * REQUEST_BYTES) == 3 for bits in seen)
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("direct", ["auto", "off"])
def test_a_write_leaves_one_wrong_bit_in_the_file_alone(backend: str, direct: str, ssd_dir: Path) -> None:
    data, seen = os.urandom(NUM_BYTES), []
    with ordered(backend) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", NUM_BYTES, direct=direct), filled(data)
        for seed in (1, 1, 2):
            engine.inject(flip_op="write", flip_after_n=2, flip_count=2, seed=seed)
            transfer(engine.submit_write, volume, memory)
            assert memory.view == data
            seen.append(flipped_bits(Path(volume.paths[0]).read_bytes(), data))
        transfer(engine.submit_write, volume, memory)
        assert Path(volume.paths[0]).read_bytes() == data
        assert engine.stats()["errors"] == 0
    assert all([bit // (8 * REQUEST_BYTES) for bit in bits] == [2, 3] for bits in seen)
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("op", ["read", "write"])
def test_flips_hit_what_short_transfers_move(backend: str, op: str, ssd_dir: Path) -> None:
    data = os.urandom(NUM_BYTES)
    with ordered(backend) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", NUM_BYTES), AlignedBuffer(NUM_BYTES)
        for flip_op in (None, op):
            engine.inject(flip_op=flip_op, flip_count=5, short_transfers=True, seed=4)
            transfer(engine.submit_write, volume, filled(data))
            transfer(engine.submit_read, volume, memory)
            assert len(flipped_bits(memory.view, data)) == (5 if flip_op else 0)


def new_prefix_bytes(got: bytes, old: int, new: int) -> int:
    """Length of the ``new`` bytes that got holds before ``old`` ones; anything else is a
    failure."""
    prefix_bytes = len(got) - len(got.lstrip(bytes([new])))
    assert got == bytes([new]) * prefix_bytes + bytes([old]) * (len(got) - prefix_bytes)
    return prefix_bytes


@pytest.mark.parametrize("direct", ["auto", "off"])
def test_a_torn_write_reports_success_and_leaves_a_prefix(backend: str, direct: str, ssd_dir: Path) -> None:
    lengths = []
    with ordered(backend) as engine:
        volume = engine.create_volume([ssd_dir], "v", NUM_BYTES, direct=direct)
        for seed in (*range(12), 0):
            transfer(engine.submit_write, volume, filled(b"\1" * NUM_BYTES))
            engine.inject(torn_after_n=4, torn_count=1, seed=seed)
            transfer(engine.submit_write, volume, memory := filled(b"\2" * NUM_BYTES))
            assert memory.view == b"\2" * NUM_BYTES
            got = Path(volume.paths[0]).read_bytes()
            begin, end = 4 * REQUEST_BYTES, 5 * REQUEST_BYTES
            assert set(got[:begin] + got[end:]) == {2}
            lengths.append(new_prefix_bytes(got[begin:end], old=1, new=2))
        stats = engine.stats()
        assert stats["errors"] == 0 and stats["writes"] == 2 * 13 * 8
    assert all(length % 512 == 0 and length < REQUEST_BYTES for length in lengths)
    assert lengths[-1] == lengths[0] and len(set(lengths)) > 6
    assert any(length % 4096 for length in lengths), "not only whole pages"


def test_a_torn_write_may_leave_nothing(backend: str, ssd_dir: Path) -> None:
    """A request of 4 KiB has eight prefixes, one of them empty."""
    lengths = set()
    with ordered(backend) as engine:
        volume = engine.create_volume([ssd_dir], "v", 4 * KIB)
        for seed in range(60):
            transfer(engine.submit_write, volume, filled(b"\1" * 4 * KIB))
            engine.inject(torn_count=1, seed=seed)
            transfer(engine.submit_write, volume, filled(b"\2" * 4 * KIB))
            lengths.add(new_prefix_bytes(Path(volume.paths[0]).read_bytes(), old=1, new=2))
    assert lengths == set(range(0, 4096, 512))
