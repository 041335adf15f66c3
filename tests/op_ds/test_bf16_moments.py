"""Moments in bf16: the exact update and one stochastic rounding, the same whatever computes it, and
right on average."""

import numpy as np
import pytest
import torch

import op_ds
from tests.support.adamw import ADAM, adversarial_grad, isa, page_aligned, random_grad  # noqa: F401

pytestmark = pytest.mark.native
KEY = op_ds.rounding_key(3, 7, 2)


class Short:
    """The planes of a vector of parameters whose moments are bf16."""

    def __init__(self, n: int, seed: int = 0) -> None:
        weights = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        self.hi, self.lo = (page_aligned(n, torch.int16) for _ in range(2))
        self.m, self.v = (page_aligned(n, torch.bfloat16) for _ in range(2))
        with op_ds.Pool(1) as pool:
            pool.split(weights.data_ptr(), self.hi.data_ptr(), self.lo.data_ptr(), n)

    @property
    def planes(self) -> list[torch.Tensor]:
        return [self.hi, self.lo, self.m, self.v]

    def update(self, pool: op_ds.Pool, grad: torch.Tensor, step: int, *, begin: int = 0, end: int | None = None,
               key: int = KEY, first: int = 0, **options: object) -> None:
        end = grad.numel() if end is None else end
        settings = {"ranges": [(end - begin, 0.1)], **ADAM, **options}
        pool.adamw(*(p[begin:].data_ptr() for p in (*self.planes, grad)), end - begin, step=step,
                   grad_dtype="bf16" if grad.dtype == torch.bfloat16 else "fp32",
                   moments="bf16", rounding=op_ds.Rounding(key=op_ds.rounding_key(key, step), first=first + begin), **settings)


def assert_same(one: Short, other: Short) -> None:
    for name, a, b in zip(("hi", "lo", "m", "v"), one.planes, other.planes, strict=True):
        wrong = (a.view(torch.int16) != b.view(torch.int16)).nonzero().flatten()
        assert len(wrong) == 0, f"{name}: {len(wrong)} of {len(a)} differ, first at {int(wrong[0])}"


def defined_draws(key: int, first: int, count: int) -> np.ndarray:
    """As docs/optimizer.md has them."""
    word = np.uint32
    x = np.arange(first, first + count, dtype=np.uint64).astype(word) ^ word(key & 0xffffffff)
    x ^= x >> word(16)
    x = x * word(0x85ebca6b) + word(key >> 32)
    x ^= x >> word(13)
    x = x * word(0xc2b2ae35)
    return x ^ (x >> word(16))


def rounded(values: torch.Tensor, noise: np.ndarray) -> torch.Tensor:
    bits = values.numpy().view(np.uint32)
    carry = np.where((bits & np.uint32(0x7fffffff)) < 0x7f7f0000, noise, 0).astype(np.uint32)
    return torch.from_numpy(((bits + carry) >> np.uint32(16)).astype(np.uint16).view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_an_update_is_the_exact_one_rounded_as_defined(isa: str, beta1: float, grad_type: torch.dtype) -> None:  # noqa: F811
    n = 30_011
    short = Short(n)
    with op_ds.Pool(2, isa=isa) as pool:
        for step in range(1, 9):
            grad = adversarial_grad(n, step).to(grad_type)
            exact = [short.hi.clone(), short.lo.clone(), short.m.float(), short.v.float()]
            options = dict(step=step, grad_dtype="bf16" if grad_type == torch.bfloat16 else "fp32", ranges=[(n, 0.1)],
                           grad_scale=0.4, **{**ADAM, "beta1": beta1})
            pool.adamw(*(p.data_ptr() for p in (*exact, grad)), n, **options)
            short.update(pool, grad, step, grad_scale=0.4, beta1=beta1)
            noise = defined_draws(op_ds.rounding_key(KEY, step), 0, n)
            assert torch.equal(short.hi, exact[0]) and torch.equal(short.lo, exact[1])
            for found, whole, part in ((short.m, exact[2], noise & 0xffff), (short.v, exact[3], noise >> 16)):
                assert torch.equal(found.view(torch.int16), rounded(whole, part).view(torch.int16))


def test_no_result_depends_on_isa_threads_cuts_or_place(isa: str) -> None:  # noqa: F811
    n, cuts = 50_021, ((0, 1), (1, 20), (20, 4096), (4096, 33_333), (33_333, 50_021))
    expected, whole, cut, moved = (Short(n) for _ in range(4))
    with op_ds.Pool(1, isa="scalar") as reference, op_ds.Pool(3, isa=isa) as pool:
        for step in range(1, 5):
            grad = random_grad(n, step).bfloat16()
            expected.update(reference, grad, step)
            whole.update(pool, grad, step)
            for begin, end in cuts:
                cut.update(pool, grad, step, begin=begin, end=end)
            elsewhere, before = Short(n), [p.clone() for p in moved.planes]
            moved.update(pool, grad, step, to=tuple(p.data_ptr() for p in elsewhere.planes))
            assert all(torch.equal(p, b) for p, b in zip(moved.planes, before))
            moved = elsewhere
    for other in (whole, cut, moved):
        assert_same(other, expected)


def test_a_vector_longer_than_the_counter_goes_on_from_zero(isa: str) -> None:  # noqa: F811
    n, grad = 1000, random_grad(1000, 1)
    around, apart = Short(n), Short(n)
    with op_ds.Pool(1, isa=isa) as pool:
        around.update(pool, grad, 1, first=2**32 - 300)
        apart.update(pool, grad, 1, end=300, first=2**32 - 300)
        apart.update(pool, grad, 1, begin=300, first=2**33 - 300)
    assert_same(around, apart)


def test_what_cannot_grow_is_cut_off(isa: str) -> None:  # noqa: F811
    """The largest numbers do not become infinite by rounding, and what is not finite stays so."""
    limit = torch.finfo(torch.bfloat16).max
    short = Short(64)
    short.m[:48], short.v[:] = limit, limit
    grad = torch.full((64,), limit)
    grad[48:] = float("nan")
    with op_ds.Pool(1, isa=isa) as pool:
        for step in range(1, 6):
            short.update(pool, grad, step, grad_scale=1.0)
    assert (short.m[:48] == limit).all() and (short.v[:48] == float("inf")).all() and short.m[48:].isnan().all()


def test_rounding_is_right_on_average_and_independent() -> None:
    """A number between two of bf16 becomes the upper one as often as it is near to it; no draw
    tells of that for another element, plane, step, vector or seed."""
    n = 1 << 16
    words = {name: defined_draws(key, 0, n) for name, key in {
        "one": op_ds.rounding_key(0, 1, 0), "step": op_ds.rounding_key(0, 2, 0), "vector": op_ds.rounding_key(0, 1, 1),
        "seed": op_ds.rounding_key(1, 1, 0), "key of zeros": 0}.items()}
    uniform = {name: part.astype(np.float64) / 65536 - 0.5 for word, draws in words.items()
               for name, part in ((f"{word}, m", draws & 0xffff), (f"{word}, v", draws >> 16))}
    for name, values in uniform.items():
        assert abs(values.mean()) < 5 * 0.2887 / n**0.5, name
        assert abs(values.std() - 0.2887) < 0.003, name
        for distance in (1, 2, 16, 128, 4096):
            assert abs(np.corrcoef(values[:-distance], values[distance:])[0, 1]) < 5 / n**0.5, (name, distance)
    correlations = np.corrcoef(list(uniform.values())) - np.eye(len(uniform))
    assert np.abs(correlations).max() < 5 / n**0.5


def test_a_small_change_adds_up(isa: str) -> None:  # noqa: F811
    """A second moment that decays by a thousandth of itself a step, which no rounding to nearest of
    8 bits would let it."""
    n, steps = 1 << 14, 1000
    short, zeros = Short(n), torch.zeros(1 << 14)
    short.v[:], short.m[:] = 1.0, 1.0
    with op_ds.Pool(1, isa=isa) as pool:
        for step in range(1, steps + 1):
            short.update(pool, zeros, step, beta1=0.999)
    wanted = 0.999**steps
    for moment in (short.m, short.v):
        assert moment.float().mean().item() == pytest.approx(wanted, rel=0.005)
        assert moment.float().std().item() < 0.1 * wanted
    assert torch.tensor(0.999).bfloat16() == 1.0


def test_rounded_moments_that_overlap_their_targets_are_refused() -> None:
    short, grad = Short(64), torch.zeros(64)
    with op_ds.Pool(1) as pool, pytest.raises(ValueError, match="must be the same or not overlap"):
        short.update(pool, grad, 1, to=(short.hi.data_ptr(), short.lo.data_ptr(), short.m.data_ptr() + 2, short.v.data_ptr()))
