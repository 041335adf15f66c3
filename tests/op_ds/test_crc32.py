"""Pool.crc32 against zlib: every path, every short length, any alignment, any cut into pieces."""

import threading
import zlib

import numpy as np
import pytest

import op_ds

pytestmark = pytest.mark.native


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> str:
    try:
        op_ds.Pool(1, isa=request.param).close()
    except op_ds.UnsupportedIsaError:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def random_bytes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def by_zlib(data: np.ndarray, piece_bytes: int) -> list[int]:
    return [zlib.crc32(data[at:at + piece_bytes]) for at in range(0, len(data), piece_bytes)]


def test_every_short_length_at_every_start(isa: str) -> None:
    data = random_bytes(400)
    with op_ds.Pool(1, isa=isa) as pool:
        for start in (0, 1, 3, 8, 15, 16, 17, 63):
            for count in range(301):
                got = pool.crc32(data.ctypes.data + start, count, max(count, 1))
                assert got.tolist() == by_zlib(data[start:start + count], max(count, 1)), (start, count)


def test_long_messages(isa: str) -> None:
    data, rng = random_bytes(3_000_000), np.random.default_rng(1)
    with op_ds.Pool(2, isa=isa) as pool:
        for _ in range(40):
            start, count = int(rng.integers(0, 100)), int(rng.integers(300, len(data) - 100))
            assert pool.crc32(data.ctypes.data + start, count, count)[0] == zlib.crc32(data[start:start + count])


@pytest.mark.parametrize("make", [np.zeros, np.ones])
def test_constant_messages(isa: str, make: type) -> None:
    """Zeros of different lengths differ only by the inversions: a lost state would show here."""
    data = make(5000, dtype=np.uint8) * np.uint8(255)
    with op_ds.Pool(1, isa=isa) as pool:
        for count in range(1, 5000, 61):
            assert pool.crc32(data.ctypes.data, count, count)[0] == zlib.crc32(data[:count])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_pieces(isa: str, num_threads: int) -> None:
    data = random_bytes(2_000_003)
    with op_ds.Pool(num_threads, isa=isa) as pool:
        for piece_bytes in (7, 4096, 4097, 1 << 18, (1 << 18) + 1, 2_000_002, 2_000_003, 1 << 40):
            out = np.full(-(-len(data) // piece_bytes), 9, dtype=np.uint32)
            assert pool.crc32(data.ctypes.data, len(data), piece_bytes, out) is out
            assert out.tolist() == by_zlib(data, piece_bytes)
        assert pool.crc32(data.ctypes.data, 1000, 1).tolist() == by_zlib(data[:1000], 1)
        empty = pool.crc32(0, 0, 4096)
        assert empty.shape == (0,) and empty.dtype == np.uint32


def test_one_flipped_bit_changes_its_piece_alone(isa: str) -> None:
    data = random_bytes(1 << 20)
    with op_ds.Pool(2, isa=isa) as pool:
        before = pool.crc32(data.ctypes.data, len(data), 4096)
        data[123_456] ^= 16
        after = pool.crc32(data.ctypes.data, len(data), 4096)
    assert np.flatnonzero(before != after).tolist() == [123_456 // 4096]


def test_sums_and_updates_from_several_threads_do_not_mix() -> None:
    data, n = random_bytes(1 << 20), 40_000
    wanted = by_zlib(data, 65_536)
    with op_ds.Pool(2) as pool:
        stop, outcomes = threading.Event(), []

        def update() -> None:
            planes = [np.zeros(n, dtype) for dtype in (np.uint16, np.int16, np.float32, np.float32, np.float32)]
            planes[4][:] = 1.0
            for step in range(1, 200):
                pool.adamw(*(plane.ctypes.data for plane in planes), n, grad_dtype="fp32", lr=1e-3, beta1=0.9,
                           beta2=0.999, eps=1e-8, step=step)
            outcomes.append(len(np.unique(planes[2])))
            stop.set()

        thread = threading.Thread(target=update)
        thread.start()
        while not stop.is_set():
            assert pool.crc32(data.ctypes.data, len(data), 65_536).tolist() == wanted
        thread.join()
    assert outcomes == [1], "equal gradients gave different moments"


@pytest.mark.parametrize("out", [
    np.empty(3, np.uint32), np.empty(4, np.int32), np.empty((4, 1), np.uint32), np.empty(8, np.uint32)[::2]])
def test_unusable_arrays_are_refused(out: np.ndarray) -> None:
    data = random_bytes(16_384)
    with op_ds.Pool(1) as pool, pytest.raises(ValueError, match="contiguous uint32 array of 4 elements"):
        pool.crc32(data.ctypes.data, len(data), 4096, out)


def test_bad_arguments() -> None:
    read_only = np.empty(1, np.uint32)
    read_only.flags.writeable = False
    with op_ds.Pool(1) as pool:
        with pytest.raises(ValueError, match="writable: False"):
            pool.crc32(0, 1, 1, read_only)
        with pytest.raises(ValueError, match="num_bytes must not be negative"):
            pool.crc32(0, -1, 1)
        with pytest.raises(ValueError, match="piece_bytes must be at least 1"):
            pool.crc32(0, 1, 0)
