"""Updating planes through torch or Triton gives the bits that op_ds gives."""

import ctypes
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from ratel.errors import RatelError
from ratel.native import op_ds
from ratel.runtime.updates import gpu_adamw

ADAM = dict(lr=1e-3, beta2=0.999, eps=1e-8)
EDGE_VALUES = (0.0, -0.0, 1e-45, -1e-39, 1e-30, 1.1754944e-38, 1.0, -3e38, 2e19)
MOMENTS = (torch.float32, torch.bfloat16, torch.uint8)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "8bit"}

Planes = list[torch.Tensor]


@pytest.fixture
def pool() -> Iterator[op_ds.Pool]:
    with op_ds.Pool(1) as made:
        yield made


def make_planes(n: int, seed: int, moments: torch.dtype = torch.float32) -> Planes:
    """hi, lo, m, v of parameters some of which are zero, denormal or about to overflow bf16."""
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(n, generator=rng)
    for i, value in enumerate((*EDGE_VALUES[:6], 3.3999e38)):
        weights[i::101] = value
    hi, lo = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16)
    gpu_adamw.split_master(weights, hi, lo)
    count = n // 128 * 132 if moments is torch.uint8 else n
    return [hi, lo, torch.zeros(count, dtype=moments), torch.zeros(count, dtype=moments)]


def draws(step: int, moments: torch.dtype) -> op_ds.Rounding | None:
    """A vector that begins just before the counter comes to its end."""
    return None if moments is torch.float32 else op_ds.Rounding(key=op_ds.rounding_key(5, step, 1), first=2**32 - 5120)


def make_grad(n: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    grad = torch.randn(n, generator=rng) * torch.exp(10 * torch.randn(n, generator=rng))
    for i, value in enumerate(EDGE_VALUES):
        grad[i + seed % 3::19 + 2 * i] = value
    return grad.to(dtype)


def native_update(pool: op_ds.Pool, planes: Planes, grad: torch.Tensor, **options: object) -> None:
    dtype = "bf16" if grad.dtype == torch.bfloat16 else "fp32"
    pool.adamw(*(p.data_ptr() for p in (*planes, grad)), len(grad), grad_dtype=dtype, moments=NAMES[planes[2].dtype], **options)


def assert_same_bits(got: Planes, wanted: Planes) -> None:
    for name, a, b in zip(("hi", "lo", "m", "v"), got, wanted, strict=True):
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
        wrong = (a.cpu().view(integers) != b.cpu().view(integers)).nonzero().flatten()
        assert len(wrong) == 0, f"{name}: {len(wrong)} of {len(a)} differ, first at {int(wrong[0])}"


@pytest.mark.numerics
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.3])
def test_reference_equals_op_ds(pool: op_ds.Pool, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype,
                                beta1: float, moments: torch.dtype) -> None:
    n = 20_096 if moments is torch.uint8 else 20_011
    monkeypatch.setattr(gpu_adamw, "REFERENCE_CHUNK", 3072)
    planes, wanted = make_planes(n, 0, moments), make_planes(n, 0, moments)
    for step in range(1, 13):
        grad = make_grad(n, step, dtype)
        options = dict(**ADAM, beta1=beta1, step=step, grad_scale=0.37, ranges=[(7040, 0.1), (7040, 0.5), (n, 0.0)],
                       rounding=draws(step, moments))
        gpu_adamw.adamw_(*planes, grad, **options)
        native_update(pool, wanted, grad, **options)
        assert_same_bits(planes, wanted)


@pytest.mark.numerics
def test_planes_are_those_of_op_ds(pool: op_ds.Pool) -> None:
    upper = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    wide = (upper + torch.tensor([0, 1, 0x7fff, 0x8000, 0x8001, 0xffff])).flatten()
    master = (wide - ((wide >> 31) << 32)).to(torch.int32).view(torch.float32)
    hi, lo = torch.empty(len(master), dtype=torch.bfloat16), torch.empty(len(master), dtype=torch.int16)
    wanted = [torch.empty_like(hi), torch.empty_like(lo)]
    gpu_adamw.split_master(master, hi, lo)
    pool.split(master.data_ptr(), wanted[0].data_ptr(), wanted[1].data_ptr(), len(master))
    assert torch.equal(hi.view(torch.int16), wanted[0].view(torch.int16)) and torch.equal(lo, wanted[1])
    assert torch.equal(gpu_adamw.merge_master(hi, lo).view(torch.int32), master.view(torch.int32))


def exact_fma(a: float, b: float, c: float) -> float:
    """Rational arithmetic, rounded to fp32 by integer division: shares nothing with the code under
    test."""
    value = Fraction(a) * Fraction(b) + Fraction(c)
    if value == 0:
        return 0.0
    exponent = max(math.frexp(float(value))[1] - 24, -149) if abs(value) > Fraction(2) ** -1000 else -149
    quantum = Fraction(2) ** exponent
    return float(round(value / quantum) * quantum)  # round() of a Fraction is half to even


@pytest.mark.numerics
def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    # Odd products of 25 bits are ties of fp32; an addend below an fp64 ulp decides them, and is
    # lost if rounded twice.
    p, q = (rng.integers(2**bits, 2 ** (bits + 1), 4000) | 1 for bits in (11, 12))
    a, b = p.astype(np.float32), q.astype(np.float32)
    c = rng.choice([2.0**-40, -(2.0**-40), 0.0, 1e-45, -0.5, 1e8], 4000).astype(np.float32)
    a[::2], b[::2], c[::2] = (rng.standard_normal((3, 2000)) * 2.0 ** rng.integers(-75, 60, (3, 2000)))
    edge = np.array([2.0**-24, 1 + 2.0**-23, 1.0, 2.0**-75, 2.0**-149, 3e38, -1.0], dtype=np.float32)
    a, b, c = (np.concatenate([x, y.ravel()]) for x, y in zip((a, b, c), np.meshgrid(edge, edge, edge), strict=True))
    got = gpu_adamw.fma(*(torch.from_numpy(x) for x in (a, b, c))).numpy()
    limit = float(np.finfo(np.float32).max)
    wanted = np.array([exact_fma(*map(float, abc)) for abc in zip(a, b, c, strict=True)])
    with np.errstate(over="ignore"):
        wanted = np.where(np.abs(wanted) > limit, np.copysign(np.inf, wanted), wanted).astype(np.float32)
        twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (got == wanted).all()
    assert (twice != wanted).sum() > 100, "the cases must include some that rounding twice gets wrong"


@pytest.mark.numerics
def test_fma_equals_the_processor() -> None:
    fmaf = ctypes.CDLL("libm.so.6").fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    rng = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(5000, generator=rng) * torch.exp(20 * torch.randn(5000, generator=rng)) for _ in range(3))
    c[::3] = -(a * b)[::3]
    a[0], b[1], c[2] = float("inf"), float("inf"), float("-inf")
    wanted = torch.tensor([fmaf(*map(float, abc)) for abc in zip(a, b, c, strict=True)])
    got, number = gpu_adamw.fma(a, b, c), ~wanted.isnan()
    assert torch.equal(got.view(torch.int32)[number], wanted.view(torch.int32)[number])
    assert torch.equal(got.isnan(), wanted.isnan())


@pytest.mark.unit
def test_paths_are_chosen_or_refused() -> None:
    cpu = torch.device("cpu")
    assert gpu_adamw.choose_update(cpu) is gpu_adamw.choose_update(cpu, "reference")
    with pytest.raises(RatelError, match="Triton cannot update planes here"):
        gpu_adamw.choose_update(cpu, "triton")
    with pytest.raises(RatelError, match="Choose one of auto, triton, reference"):
        gpu_adamw.choose_update(cpu, "fast")
    with pytest.raises(ValueError, match="must cover all 8 elements"):
        gpu_adamw.adamw_(*make_planes(8, 0), torch.zeros(8), **ADAM, beta1=0.9, step=1, ranges=[(7, 0.0)])


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["triton", "reference"])
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_gpu_equals_op_ds(pool: op_ds.Pool, path: str, dtype: torch.dtype, beta1: float, moments: torch.dtype) -> None:
    for n in (128, 1152, 99_968) if moments is torch.uint8 else (1, 127, 100_003):
        planes, wanted = [p.cuda() for p in make_planes(n, 0, moments)], make_planes(n, 0, moments)
        for step in range(1, 13):
            grad = make_grad(n, step, dtype)
            options = dict(**ADAM, beta1=beta1, step=step, grad_scale=0.37, ranges=[(n // 384 * 128, 0.1), (n, 0.0)],
                           rounding=draws(step, moments))
            gpu_adamw.adamw_(*planes, grad.cuda(), **options, path=path)
            native_update(pool, wanted, grad, **options)
            assert_same_bits(planes, wanted)


@pytest.mark.gpu
def test_auto_takes_triton_on_nvidia() -> None:
    pytest.importorskip("triton")
    from ratel.runtime.updates.gpu_adamw_kernel import triton_update

    assert gpu_adamw.choose_update(torch.device("cuda")) is triton_update
