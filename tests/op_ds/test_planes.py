"""The kernels beside AdamW: halves of the master, sums of squares, memory, and calls from several threads."""

import threading

import numpy as np
import pytest
import torch

import op_ds

from tests.support.adamw import Planes, assert_same_bits, isa, pool, random_grad  # noqa: F401

pytestmark = pytest.mark.native


def interesting_bits() -> torch.Tensor:
    """Every upper half with the lower halves around the tie, the ends, and some in between."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    lower = torch.tensor([0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1234], dtype=torch.int64)
    patterns = (upper[:, None] + lower).flatten()
    return (patterns - ((patterns >> 31) << 32)).to(torch.int32)


def test_split_and_merge_are_exact_for_every_class_of_bits(isa: str) -> None:
    patterns = interesting_bits()
    n, wide = len(patterns), patterns.to(torch.int64) & 0xffffffff
    hi, lo, back = torch.empty(n, dtype=torch.int16), torch.empty(n, dtype=torch.int16), torch.empty_like(patterns)
    with op_ds.Pool(2, isa=isa) as pool:
        pool.split(patterns.data_ptr(), hi.data_ptr(), lo.data_ptr(), n)
        pool.merge(hi.data_ptr(), lo.data_ptr(), back.data_ptr(), n)
    assert torch.equal(back, patterns)
    assert torch.equal(hi.to(torch.int64) & 0xffff, ((wide + 0x8000) >> 16) & 0xffff)
    rounded = hi.view(torch.bfloat16).float()
    exact = patterns.view(torch.float32)
    finite = torch.isfinite(exact) & torch.isfinite(rounded)
    error = (rounded.double() - exact.double()).abs()[finite]
    nearest = (exact.bfloat16().double() - exact.double()).abs()[finite]
    assert torch.equal(error, nearest)  # half up picks another neighbour on ties only


def pairwise(values: np.ndarray) -> np.ndarray:
    """Adds neighbours along the last axis until one is left; the definition in
    docs/optimizer.md."""
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
        values = values[..., 0::2] + values[..., 1::2]
    return values[..., 0]


def defined_sum_squares(grad: torch.Tensor) -> float:
    x = grad.double().numpy()
    x = np.concatenate([x, np.zeros(-len(x) % 1024)]).reshape(-1, 32, 32)
    lanes = np.zeros((len(x), 32))
    for row in range(32):
        lanes += x[:, row] * x[:, row]
    return float(pairwise(pairwise(lanes)))


@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
def test_sum_squares_is_its_definition_for_any_threads(isa: str, grad_type: torch.dtype) -> None:
    dtype = "bf16" if grad_type == torch.bfloat16 else "fp32"
    for n in (1, 31, 1023, 1024, 1025, 65_536, 200_003):
        grad = random_grad(n, n).to(grad_type)
        wanted = defined_sum_squares(grad)
        assert wanted == pytest.approx(grad.double().square().sum().item(), rel=1e-12)
        for num_threads in (1, 3):
            with op_ds.Pool(num_threads, isa=isa) as pool:
                assert pool.sum_squares(grad.data_ptr(), n, dtype) == (wanted, 0)


@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
def test_sum_squares_counts_what_is_not_finite(isa: str, grad_type: torch.dtype) -> None:
    grad = torch.full((150_001,), 3e38).to(grad_type)
    dtype = "bf16" if grad_type == torch.bfloat16 else "fp32"
    with op_ds.Pool(2, isa=isa) as pool:
        total, count = pool.sum_squares(grad.data_ptr(), len(grad), dtype)
        assert count == 0 and total == pytest.approx(len(grad) * float(grad[0]) ** 2)
        grad[[0, 77_777, 150_000]] = torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=grad_type)
        total, count = pool.sum_squares(grad.data_ptr(), len(grad), dtype)
        assert count == 3 and not np.isfinite(total)
    assert op_ds.Pool(1).sum_squares(0, 0, dtype) == (0.0, 0)


def test_memory_helpers(pool: op_ds.Pool) -> None:
    rng = np.random.default_rng(0)
    for n in (0, 1, 63, 64, 4097, 1_000_003):
        source = rng.integers(0, 256, n + 7, dtype=np.uint8)
        target = np.full(n + 7, 9, dtype=np.uint8)
        pool.copy(target.ctypes.data + 3, source.ctypes.data + 5, n)
        assert (target[3:n + 3] == source[5:n + 5]).all() and (target[:3] == 9).all() and (target[n + 3:] == 9).all()
        pool.fill(target.ctypes.data + 1, n, 7)
        assert (target[1:n + 1] == 7).all() and target[0] == 9 and (target[n + 3:] == 9).all()
    fresh = np.zeros(10_000_019, dtype=np.uint8)
    pool.touch(fresh.ctypes.data, len(fresh))
    assert not fresh.any()
    pool.touch(target.ctypes.data, len(target))
    assert (target[1:n + 1] == 7).all() and target[0] == 9 and (target[n + 3:] == 9).all()  # what is there stays
    a, b, c = (torch.randn(100_003) for _ in range(3))
    pool.triad(a[1:].data_ptr(), b.data_ptr(), c.data_ptr(), 0.5, 100_001)
    assert torch.equal(a[1:100_002], b[:100_001] + 0.5 * c[:100_001])
    pool.rescale(b.data_ptr(), 2.0, 50_000)
    assert not torch.equal(b, c) and pool.sum_squares(b.data_ptr(), 3, "fp32")[0] > 0


def test_calls_from_several_threads_do_not_mix(pool: op_ds.Pool) -> None:
    n = 50_000
    weights = [torch.randn(n, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    shared = [Planes(pool, w) for w in weights]

    def train(index: int) -> None:
        for step in range(1, 8):
            shared[index].update(pool, random_grad(n, 100 * index + step), step)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, planes in enumerate(shared):
        alone = Planes(pool, weights[index])
        for step in range(1, 8):
            alone.update(pool, random_grad(n, 100 * index + step), step)
        assert_same_bits(planes.tensors(pool), alone.tensors(pool))
