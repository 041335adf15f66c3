"""Moments in 8 bits: the exact update between decoding and encoding, the same whatever computes
it."""

import numpy as np
import pytest
import torch

import op_ds
from tests.support.adamw import ADAM, adversarial_grad, isa, page_aligned, random_grad  # noqa: F401
from tests.op_ds.test_bf16_moments import defined_draws

pytestmark = pytest.mark.native
BLOCK, BLOCK_BYTES = 128, 132
KEY = op_ds.rounding_key(3, 7, 2)
TINY = np.finfo(np.float32).tiny


class Narrow:
    """The planes of a vector of parameters whose moments have 8 bits."""

    def __init__(self, n: int, seed: int = 0) -> None:
        weights = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        self.hi, self.lo = (page_aligned(n, torch.int16) for _ in range(2))
        self.m, self.v = (page_aligned(n // BLOCK * BLOCK_BYTES, torch.uint8) for _ in range(2))
        with op_ds.Pool(1) as pool:
            pool.split(weights.data_ptr(), self.hi.data_ptr(), self.lo.data_ptr(), n)

    @property
    def planes(self) -> list[torch.Tensor]:
        return [self.hi, self.lo, self.m, self.v]

    def update(self, pool: op_ds.Pool, grad: torch.Tensor, step: int, *, begin: int = 0, end: int | None = None,
               **options: object) -> None:
        end = grad.numel() if end is None else end
        settings = {"ranges": [(end - begin, 0.1)], **ADAM, **options}
        places = [p[begin:].data_ptr() for p in (self.hi, self.lo)]
        places += [p[begin // BLOCK * BLOCK_BYTES :].data_ptr() for p in (self.m, self.v)]
        pool.adamw(*places, grad[begin:].data_ptr(), end - begin, step=step, moments="8bit",
                   grad_dtype="bf16" if grad.dtype == torch.bfloat16 else "fp32",
                   rounding=op_ds.Rounding(key=op_ds.rounding_key(KEY, step), first=begin), **settings)


def assert_same(one: Narrow, other: Narrow) -> None:
    for name, a, b in zip(("hi", "lo", "m", "v"), one.planes, other.planes, strict=True):
        wrong = (a != b).nonzero().flatten()
        assert len(wrong) == 0, f"{name}: {len(wrong)} of {len(a)} differ, first at {int(wrong[0])}"


def parts(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and steps by block."""
    blocks = plane.reshape(-1, BLOCK_BYTES)
    return blocks[:, :BLOCK], np.ascontiguousarray(blocks[:, BLOCK:]).view(np.float32)


def decoded(m: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    (m_codes, m_step), (v_codes, v_step) = parts(m), parts(v)
    root = v_codes.astype(np.float32) * v_step
    return (m_codes.view(np.int8).astype(np.float32) * m_step).ravel(), (root * root).ravel()


def encoded(m: np.ndarray, v: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As docs/optimizer.md has it, in numpy."""
    m, root, draws = m.reshape(-1, BLOCK), np.sqrt(v).reshape(-1, BLOCK), draws.reshape(-1, BLOCK)
    planes = []
    for values, most, limit, noise in ((m, 127, 3.4e38, draws & np.uint32(0xffff)), (root, 255, 1.8e19, draws >> np.uint32(16))):
        largest = np.minimum(np.abs(values).max(1, keepdims=True), np.float32(limit))
        step = (largest / np.float32(most)).astype(np.float32)
        step[step < TINY] = 0
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = np.where(step > 0, np.float32(1) / step, np.float32(0)).astype(np.float32)
            scaled = np.clip(values * inverse, -most, most).astype(np.float32)
        unit = noise.astype(np.float32) / np.float32(65536)
        if most == 127:
            codes = (scaled + (unit + np.float32(127))).astype(np.int32) - 127
        else:
            codes = np.maximum((scaled + unit).astype(np.int32), (values > 0).astype(np.int32))
        planes.append(np.concatenate([codes.astype(np.uint8), step.view(np.uint8)], axis=1).ravel())
    return planes[0], planes[1]


@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_an_update_is_the_exact_one_between_decoding_and_encoding(isa: str, beta1: float, grad_type: torch.dtype) -> None:  # noqa: F811
    n = 40 * 1024
    narrow = Narrow(n)
    with op_ds.Pool(2, isa=isa) as pool:
        for step in range(1, 9):
            grad = adversarial_grad(n, step).clamp(-1e18, 1e18).to(grad_type)
            if step > 4:
                grad[: n // 4] *= 1e-24
            exact = [narrow.hi.clone(), narrow.lo.clone(), *map(torch.from_numpy, decoded(narrow.m.numpy(), narrow.v.numpy()))]
            options = dict(step=step, grad_dtype="bf16" if grad_type == torch.bfloat16 else "fp32", ranges=[(n, 0.1)],
                           grad_scale=0.4, **{**ADAM, "beta1": beta1})
            pool.adamw(*(p.data_ptr() for p in (*exact, grad)), n, **options)
            narrow.update(pool, grad, step, grad_scale=0.4, beta1=beta1)
            assert torch.equal(narrow.hi, exact[0]) and torch.equal(narrow.lo, exact[1])
            wanted = encoded(exact[2].numpy(), exact[3].numpy(), defined_draws(op_ds.rounding_key(KEY, step), 0, n))
            for found, plane in zip((narrow.m, narrow.v), wanted, strict=True):
                assert (found.numpy() == plane).all(), np.flatnonzero(found.numpy() != plane)[:5]


def test_no_result_depends_on_isa_threads_cuts_or_place(isa: str) -> None:  # noqa: F811
    n, cuts = 49_920, ((0, 128), (128, 4096), (4096, 33_280), (33_280, 49_920))
    expected, whole, cut, moved = (Narrow(n) for _ in range(4))
    with op_ds.Pool(1, isa="scalar") as reference, op_ds.Pool(3, isa=isa) as pool:
        for step in range(1, 5):
            grad = random_grad(n, step).bfloat16()
            ranges = [(1280, 0.1), (20_480, 0.0), (n, 0.2)]
            expected.update(reference, grad, step, ranges=ranges)
            whole.update(pool, grad, step, ranges=ranges)
            for begin, end in cuts:
                of_cut = [(min(stop, end) - begin, decay) for stop, decay in ranges if stop > begin]
                of_cut = of_cut[: next(i for i, (stop, _) in enumerate(of_cut) if stop == end - begin) + 1]
                cut.update(pool, grad, step, begin=begin, end=end, ranges=of_cut)
            elsewhere, before = Narrow(n), [p.clone() for p in moved.planes]
            moved.update(pool, grad, step, ranges=ranges, to=tuple(p.data_ptr() for p in elsewhere.planes))
            assert all(torch.equal(p, b) for p, b in zip(moved.planes, before))
            moved = elsewhere
    for other in (whole, cut, moved):
        assert_same(other, expected)


def test_numbers_at_the_ends_stay_numbers(isa: str) -> None:  # noqa: F811
    """Infinite moments are the largest that there is; what is below normal numbers is zero."""
    n = 3 * BLOCK
    narrow, grad = Narrow(n), torch.full((3 * BLOCK,), 3e38)
    grad[BLOCK : 2 * BLOCK], grad[2 * BLOCK :] = 1e-38, 0.0
    with op_ds.Pool(1, isa=isa) as pool:
        for step in range(1, 4):
            narrow.update(pool, grad, step)
            m, v = decoded(narrow.m.numpy(), narrow.v.numpy())
            assert np.isfinite(m).all() and np.isfinite(v).all() and not m[BLOCK:].any() and not v[BLOCK:].any()
    assert (m[:BLOCK] > 1e37).all() and (v[:BLOCK] > 3e38).all()


def test_what_is_not_zero_is_not_divided_by_zero(isa: str) -> None:  # noqa: F811
    """Beside a gradient a million times as large, a second moment has the least code."""
    n = BLOCK
    narrow, grad = Narrow(n), torch.full((BLOCK,), 1e-6)
    grad[0], before = 1.0, Narrow(n)
    with op_ds.Pool(1, isa=isa) as pool:
        for step in range(1, 50):
            narrow.update(pool, grad, step, lr=1e-3, ranges=[(n, 0.0)])
        masters = [torch.empty(n) for _ in range(2)]
        for planes, master in zip((before, narrow), masters):
            pool.merge(planes.hi.data_ptr(), planes.lo.data_ptr(), master.data_ptr(), n)
    assert (parts(narrow.v.numpy())[0][0, 1:] == 1).all() and ((masters[1] - masters[0]).abs() < 0.05).all()


@pytest.mark.parametrize(("changes", "message"), [
    (dict(ranges=[(100, 0.0), (256, 0.1)]), "end with a block of 128"), (dict(rounding=None), "are rounded, others are not"),
    (dict(moments="fp16"), "moments must be one of fp32, bf16, 8bit"), (dict(moments="fp32"), "are rounded, others are not")])
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    options = dict(grad_dtype="fp32", step=1, ranges=[(256, 0.0)], moments="8bit", rounding=op_ds.Rounding(key=1), **ADAM)
    planes = [torch.zeros(256) for _ in range(5)]
    with op_ds.Pool(1) as pool, pytest.raises(ValueError, match=message):
        pool.adamw(*(p.data_ptr() for p in planes), 256, **{**options, **changes})
