"""Instruction sets, planes and gradients for tests of the optimizer's kernels. No tests here."""

from collections.abc import Iterator

import pytest
import torch

import op_ds

ISAS = ("scalar", "avx2", "avx512")
ADAM = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8)


def supports(isa: str) -> bool:
    try:
        op_ds.Pool(1, isa=isa).close()
    except op_ds.UnsupportedIsaError:
        return False
    return True


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if not supports(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.fixture
def pool() -> Iterator[op_ds.Pool]:
    with op_ds.Pool(2) as made:
        yield made


class Planes:
    """The four planes of a vector of parameters, and the calls that take them."""

    def __init__(self, pool: op_ds.Pool, weights: torch.Tensor) -> None:
        n = weights.numel()
        self.hi, self.lo = torch.empty(n, dtype=torch.int16), torch.empty(n, dtype=torch.int16)
        self.m, self.v = torch.zeros(n), torch.zeros(n)
        pool.split(weights.data_ptr(), self.hi.data_ptr(), self.lo.data_ptr(), n)

    def update(self, pool: op_ds.Pool, grad: torch.Tensor, step: int, *, begin: int = 0, end: int | None = None,
               decay: float = 0.0, kind: str = "adamw", **options: object) -> None:
        end = grad.numel() if end is None else end
        dtype = "bf16" if grad.dtype == torch.bfloat16 else "fp32"
        addresses = [p[begin:].data_ptr() for p in (self.hi, self.lo, self.m, self.v, grad)]
        settings = {"ranges": [(end - begin, decay)], "grad_dtype": dtype, **ADAM, **options}
        getattr(pool, kind)(*addresses, end - begin, step=step, **settings)

    def master(self, pool: op_ds.Pool) -> torch.Tensor:
        merged = torch.empty_like(self.m)
        pool.merge(self.hi.data_ptr(), self.lo.data_ptr(), merged.data_ptr(), merged.numel())
        return merged

    def tensors(self, pool: op_ds.Pool) -> list[torch.Tensor]:
        return [self.master(pool), self.m, self.v]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


def assert_same_bits(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        wrong = (bits(a) != bits(b)).nonzero().flatten()
        assert len(wrong) == 0, f"tensor {index}: {len(wrong)} of {len(a)} differ, first at {int(wrong[0])}"


def random_grad(n: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=rng) * torch.exp(spread * torch.randn(n, generator=rng))


def adversarial_grad(n: int, seed: int) -> torch.Tensor:
    """Zeros of both signs, denormals, values whose square overflows or underflows, and ordinary
    ones."""
    grad = random_grad(n, seed, spread=10.0)
    for i, value in enumerate((0.0, -0.0, 1e-45, -1e-39, 1e-20, 1.0, -3e38, 2e19)):
        grad[i + seed % 3::17 + 2 * i] = value
    return grad


def page_aligned(n: int, dtype: torch.dtype) -> torch.Tensor:
    raw = torch.zeros(n * dtype.itemsize + 4096, dtype=torch.uint8)
    return raw[-raw.data_ptr() % 4096 :][: n * dtype.itemsize].view(dtype)
