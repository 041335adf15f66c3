"""The orders in which an adapted linear can be computed, in plain PyTorch, and what each costs.

RunLoRA (arXiv 2312.03415) numbers the forward orders f1 to f4 and the backward ones b1 to b8. They
follow from few choices. S = X A' is made anew in backward, so that only X is saved; Z = s dY B is
the gradient of S; Q = dY' X is as large as W; D = s B A is what the adapter adds to W. Dropout
changes the adapter's X alone: where it drops something, W and D cannot become one matrix, and the
orders that merge them use D with a product of its own. Letters of shapes as in ``reference``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ratel.lora.compute import reference
from ratel.lora.compute.reference import scaled_product


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of one linear and its adapter. ``drops``: whether dropout is on. ``element_bytes``:
    of X and W."""

    rows: int
    inputs: int
    outputs: int
    rank: int
    drops: bool = False
    element_bytes: int = 2


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a graph computes with: one linear, its rows flat. ``mask`` makes the adapter's input of
    X, and its own transpose."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    mask: Callable[[Tensor], Tensor] | None = None

    def dropped(self, x: Tensor) -> Tensor:
        return x if self.mask is None else self.mask(x)

    def delta(self) -> Tensor:
        return scaled_product(self.b, self.a, self.scale)


Products = list[tuple[int, int, int]]
"""Rows, inner size and columns of matrix products."""


def forward_f1(g: Given) -> Tensor:
    return reference.linear(g.x, g.w, g.bias, g.dropped(g.x) @ g.a.t(), g.b, g.scale)


def forward_f3(g: Given) -> Tensor:
    """The adapter first; the base's product is added to its result."""
    y = scaled_product(g.dropped(g.x) @ g.a.t(), g.b.t(), g.scale)
    y = y if g.bias is None else y.add_(g.bias)
    return y.addmm_(g.x, g.w.t())


def forward_f2(g: Given) -> Tensor:
    if g.mask is None:
        return F.linear(g.x, torch.addmm(g.w, g.b, g.a, alpha=g.scale), g.bias)
    return F.linear(g.x, g.w, g.bias).addmm_(g.dropped(g.x), g.delta().t())


def forward_f4(g: Given) -> Tensor:
    """f2 on an input of three dimensions: PyTorch chooses another kernel for some shapes."""
    deep = g.x[None]
    if g.mask is None:
        y = torch.matmul(deep, torch.addmm(g.w, g.b, g.a, alpha=g.scale).t())
    else:
        y = torch.matmul(deep, g.w.t()) + torch.matmul(g.dropped(g.x)[None], g.delta().t())
    return y[0] if g.bias is None else y[0].add_(g.bias)


@dataclass(frozen=True, kw_only=True)
class Backward:
    """Where dA, dB and dX come from: dA = Z' X or s B' Q; dB = s dY' S or s Q A'; dX = dY W + Z A
    or dY (W + D)."""

    a_from_q: bool
    b_from_q: bool
    merges: bool

    def run(self, g: Given, dy: Tensor, wants_x: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """dA, dB, dX."""
        z = scaled_product(dy, g.b, g.scale) if not self.a_from_q or (wants_x and not self.merges) else None
        dropped = g.dropped(g.x)
        q = dy.t() @ dropped if self.a_from_q or self.b_from_q else None
        da = z.t() @ dropped if q is None or not self.a_from_q else scaled_product(g.b.t(), q, g.scale)
        db = scaled_product(q, g.a.t(), g.scale) if q is not None and self.b_from_q else \
            scaled_product(dy.t(), dropped @ g.a.t(), g.scale)
        return da, db, self._input(g, dy, z) if wants_x else None

    def _input(self, g: Given, dy: Tensor, z: Tensor | None) -> Tensor:
        if not self.merges:
            return (dy @ g.w).addmm_(z, g.a) if g.mask is None else g.dropped(z @ g.a).addmm_(dy, g.w)
        if g.mask is None:
            return dy @ torch.addmm(g.w, g.b, g.a, alpha=g.scale)
        return g.dropped(dy @ g.delta()).addmm_(dy, g.w)

    def products(self, size: Size) -> Products:
        m, i, j, r = size.rows, size.inputs, size.outputs, size.rank
        needs_q = self.a_from_q or self.b_from_q
        return [(m, j, i),
                *([(m, j, r)] if not (self.a_from_q and self.merges) else []),
                *([(j, m, i)] if needs_q else []),
                (r, j, i) if self.a_from_q else (r, m, i),
                *([(j, i, r)] if self.b_from_q else [(m, i, r), (j, m, r)]),
                *(merging(size, (m, j, i)) if self.merges else [(m, r, i)])]


def merging(size: Size, again: tuple[int, int, int]) -> Products:
    return [(size.outputs, size.rank, size.inputs), *([again] if size.drops else [])]


def _forward_products(size: Size, merges: bool) -> Products:
    m, i, j, r = size.rows, size.inputs, size.outputs, size.rank
    return [(m, i, j), *(merging(size, (m, i, j)) if merges else [(m, i, r), (m, r, j)])]


FORWARD: dict[str, Callable[[Given], Tensor]] = {
    "f1": forward_f1, "f2": forward_f2, "f3": forward_f3, "f4": forward_f4}

BACKWARD: dict[str, Backward] = {
    "b1": Backward(a_from_q=False, b_from_q=False, merges=False),
    "b2": Backward(a_from_q=False, b_from_q=True, merges=False),
    "b3": Backward(a_from_q=True, b_from_q=True, merges=False),
    "b4": Backward(a_from_q=True, b_from_q=True, merges=True),
    "b5": Backward(a_from_q=False, b_from_q=False, merges=True),
    "b6": Backward(a_from_q=True, b_from_q=False, merges=False),
    "b7": Backward(a_from_q=True, b_from_q=False, merges=True),
    "b8": Backward(a_from_q=False, b_from_q=True, merges=True)}


def merges(name: str) -> bool:
    """Whether an order rounds W + s B A to the weight's format, and small updates away with it."""
    return name in ("f2", "f4") or (name in BACKWARD and BACKWARD[name].merges)


def products(name: str, size: Size) -> Products:
    return BACKWARD[name].products(size) if name in BACKWARD else _forward_products(size, merges(name))


def flops(name: str, size: Size) -> int:
    return sum(2 * rows * inner * columns for rows, inner, columns in products(name, size))


def traffic_bytes(name: str, size: Size) -> int:
    """Each product reads its operands and writes its result once; what is added to a result is read
    as well."""
    elements = sum(rows * inner + inner * columns + rows * columns for rows, inner, columns in products(name, size))
    m, i, j = size.rows, size.inputs, size.outputs
    added = {"f1": m * j, "f3": m * j, "f2": j * i, "f4": j * i}.get(name, j * i if merges(name) else m * i)
    return elements * size.element_bytes + added * size.element_bytes
