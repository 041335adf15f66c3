"""The adapter's Triton kernels against the reference in fp64: any rank, odd shapes, several
linears, much memory; the same bits every time.

And what happens where they fail, which needs no GPU.
"""

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ratel.lora.compute import Adapter, Dropout, Frozen, adapted_linears, mask_key, ops, reference
from ratel.lora.compute.masks import keep_mask

BF16 = torch.bfloat16
SHAPES = [(1, 64, 64, 8, 1), (77, 200, 136, 1, 1), (1000, 512, 1024, 24, 1), (513, 1024, 256, 48, 3), (300, 320, 320, 256, 1),
          (129, 264, 72, 16, 2), (4096, 768, 768, 16, 4), (66, 130, 90, 5, 3), (8192, 256, 2048, 64, 1)]
"""Rows, inputs, outputs, rank, linears. Some are no multiples of what a load takes at once."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=torch.float32).to(dtype)


def draw_of(count: int, p: float, first_row: int = 2**33 + 5) -> Tensor | None:
    return Dropout.of(p, [mask_key(1, 2, 3, n) for n in range(count)], first_row).draw if p else None


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x.double() for x in tensors]


@pytest.fixture
def kernels_on() -> None:
    ops.use_kernels("on")
    yield
    ops.use_kernels("auto")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(33, 65), (1000, 4096), (5, 1)])
def test_masks_have_the_bits_of_the_reference(kernels_on: None, shape: tuple[int, int]) -> None:
    x = random(*shape)
    for p in (0.1, 0.5, 0.999):
        expected = reference.dropped(x.cpu(), draw_of(2, p), p, 1)
        assert torch.equal(ops.dropped(x, draw_of(2, p), p, 1).cpu(), expected)
        assert torch.equal(reference.dropped(x, draw_of(2, p), p, 1).cpu(), expected), "the reference on the GPU"


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_operation_is_the_references(kernels_on: None, shape: tuple[int, ...], p: float) -> None:
    m, i, j, r, g = shape
    x, w, bias, a = random(m, i), random(j, i, seed=1), random(j, seed=2), random(g * r, i, seed=3)
    b, dy, ds, draw = random(j, r, seed=4), random(m, j, seed=5), random(m, g * r, seed=6), draw_of(g, p)
    s = random(m, g * r, seed=7)[:, -r:]  # a part of what several linears share
    dys, ws = [dy] * min(g, 4), [w] * min(g, 4)

    def run(where: Any, convert: Callable[..., Any]) -> dict[str, tuple[Tensor, ...]]:
        return {"down": (where.down(*convert(x, a), draw, p),), "linear": (where.linear(*convert(x, w, bias, s, b), 1.5),),
                "linear, transposed": (where.linear(*convert(x, w.t().contiguous().t(), bias, s, b), 1.5),),
                "up_grads": where.up_grads(*convert(dy, b, s), 1.5), "a_grads": (where.a_grads(*convert(x, ds, a), draw, p),),
                "input_grad": (where.input_grad(list(convert(*dys)), list(convert(*ws)), *convert(ds, a), draw, p),)}

    found_all, again, expected_all = run(ops, lambda *xs: xs), run(ops, lambda *xs: xs), run(reference, wide)
    for name, found in found_all.items():
        for one, other, repeated in zip(found, expected_all[name], again[name], strict=True):
            assert one.dtype == BF16 and one.shape == other.shape
            assert error(one, other) < 5e-3, (name, error(one, other))
            assert torch.equal(one, repeated), f"{name} gives the same bits every time"


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_addresses_that_are_aligned_otherwise_and_adapters_in_fp32(kernels_on: None, p: float) -> None:
    """The same sizes again and again: what is bound to them is used for other addresses, rows and
    keys."""
    m, i, j, r = 256, 512, 256, 16
    for offset, first_row, repeat in ((0, 5, 0), (1, 5, 1), (0, 2**33, 2), (4, 7, 3), (0, 6, 4)):
        def at(*shape: int, seed: int, dtype: torch.dtype = BF16) -> Tensor:
            count = torch.Size(shape).numel()
            return random(count + 8, seed=seed + 10 * repeat, dtype=dtype)[offset:offset + count].view(shape)

        x, w, a, b = at(m, i, seed=0), at(j, i, seed=1), at(r, i, seed=2), at(j, r, seed=3, dtype=torch.float32)
        s, dy, draw = at(m, r, seed=4), at(m, j, seed=5), draw_of(1, p, first_row)
        found = [ops.down(x, a, draw, p), ops.linear(x, w, None, s, b, 1.5), *ops.up_grads(dy, b, s, 1.5),
                 ops.a_grads(x, s, a, draw, p, torch.float32), ops.input_grad([dy], [w], s, a, draw, p)]
        rounded = b.to(BF16).double()
        expected = [reference.down(*wide(x, a), draw, p), reference.linear(*wide(x, w), None, s.double(), rounded, 1.5),
                    *reference.up_grads(dy.double(), rounded, s.double(), 1.5), reference.a_grads(*wide(x, s, a), draw, p),
                    reference.input_grad(wide(dy), wide(w), *wide(s, a), draw, p)]
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert error(one, other) < 5e-3, (number, offset, first_row)
        for gradient in (found[3], found[4]):
            assert gradient.dtype == torch.float32 and torch.equal(gradient, gradient.to(BF16).float()), "rounded as products are"


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("graph", ["fused", "f1+b1", "f3+b3", "f2+b5"])
def test_autograd_with_the_same_masks(kernels_on: None, graph: str, p: float) -> None:
    m, i, outputs, r = 515, 384, (384, 128, 128), 16
    leaves = [random(3, m, i).requires_grad_(), *(random(r, i, seed=n).mul_(0.1).requires_grad_() for n in range(3)),
              *(random(j, r, seed=n).mul_(0.1).requires_grad_() for n, j in enumerate(outputs))]
    weights, dys = [random(j, i, seed=9) for j in outputs], [random(3, m, j, seed=10) for j in outputs]
    keys = [mask_key(1, 2, 3, n) for n in range(3)]
    dropout = Dropout.of(p, keys, 70)
    ys = adapted_linears(leaves[0], [Frozen(weight=w) for w in weights],
                         [Adapter(a=leaves[1 + n], b=leaves[4 + n], scale=2.0) for n in range(3)], dropout, graph)
    found = [*ys, *torch.autograd.grad(ys, leaves, dys)]
    x, *rest = [leaf.detach().double().requires_grad_() for leaf in leaves]
    kept = [keep_mask(3 * m, i, key, p, 70, "cuda").view(3, m, i) if p else torch.ones((), device="cuda") for key in keys]
    plain = [F.linear(x, w.double()) + 2 * F.linear(F.linear(x * kept[n] / (1 - p), rest[n]), rest[3 + n])
             for n, w in enumerate(weights)]
    expected = [*plain, *torch.autograd.grad(plain, [x, *rest], [dy.double() for dy in dys])]
    for one, other in zip(found, expected, strict=True):
        assert error(one, other.detach()) < 8e-3


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(kernels_on: None) -> None:
    rows, inputs, rank, last = 2**31 // 4096 + 300, 4096, 8, 128
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    x, a, draw = random(rows, inputs, dtype=BF16), random(rank, inputs, seed=1), draw_of(1, 0.1, 0)
    ds, b = random(rows, rank, seed=2), random(inputs, rank, seed=3)
    tail = draw_of(1, 0.1, rows - last)
    assert error(ops.down(x, a, draw, 0.1)[-last:], reference.down(*wide(x[-last:], a), tail, 0.1)) < 5e-3
    w = random(inputs, inputs, seed=4)
    dx = ops.input_grad([x], [w], ds, a, draw, 0.1)
    assert error(dx[-last:], reference.input_grad(wide(x[-last:]), wide(w), *wide(ds[-last:], a), tail, 0.1)) < 5e-3
    del dx
    zeros = torch.zeros_like(ds)
    zeros[-last:] = ds[-last:]
    assert error(ops.a_grads(x, zeros, a, draw, 0.1), reference.a_grads(*wide(x[-last:], ds[-last:], a), tail, 0.1)) < 5e-3
    found, _ = ops.up_grads(x, b, ds, 1.0)
    assert error(found[-last:], reference.up_grads(*wide(x[-last:], b, ds[-last:]), 1.0)[0]) < 5e-3


@pytest.mark.numerics
def test_a_kernel_that_fails_is_said_once_and_done_without(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls, broken = [], ModuleType("ratel.lora.compute.launch")
    broken.can = lambda x: True
    broken.down = lambda *args: calls.append(args) or (_ for _ in ()).throw(RuntimeError("no such instruction\nmore"))
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    monkeypatch.setattr("ratel.lora.compute.launch", broken, raising=False)
    monkeypatch.setattr(ops, "_triton_is_there", lambda device_type: True)
    x, a = torch.randn(4, 8), torch.randn(2, 8)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert torch.equal(ops.down(x, a, None, 0.0), x @ a.t())
        assert len(calls) == 1
        assert [r.getMessage() for r in caplog.records] == [
            "a Triton kernel failed (RuntimeError: no such instruction): adapters are computed by plain PyTorch from here on"]
        ops.use_kernels("on")
        with pytest.raises(RuntimeError, match="no such instruction"):
            ops.down(x, a, None, 0.0)
    finally:
        ops.use_kernels("auto")
