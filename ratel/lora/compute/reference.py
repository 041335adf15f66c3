"""The adapter's operations in plain PyTorch: what the CPU runs, what the kernels are tested
against, what runs where they cannot.

All inputs have two dimensions. Letters: M rows, i inputs, j outputs, r rank, g linears that share
an input. x [M, i], w [j, i], a [g r, i] (the linears' A, one below the other), b [j, r], s [M, g
r], dy [M, j]. B may be in fp32 where the rest is not: it is rounded for products, and its gradient,
rounded as products are, is in fp32. ``draw`` is ``Dropout``'s, with as many keys as there are linears; None: nothing is
dropped, and all of a is one.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ratel.lora.compute.masks import masked


def dropped(x: Tensor, draw: Tensor | None, p: float, index: int = 0) -> Tensor:
    """x as the adapter of the linear number ``index`` sees it."""
    if draw is None:
        return x
    first_row, *keys = draw.tolist()
    return masked(x, keys[index], p, first_row)


def down(x: Tensor, a: Tensor, draw: Tensor | None, p: float) -> Tensor:
    """s: the dropped input times A transposed, of all linears side by side."""
    return torch.cat([dropped(x, draw, p, index) @ a[part].t() for index, part in _parts(a.shape[0], draw)], dim=1)


def linear(x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float) -> Tensor:
    """x W' + bias + scale s B'."""
    return F.linear(x, w, bias).addmm_(s, b.to(s.dtype).t(), alpha=scale)


def up_grads(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of s [M, r] and of B [j, r]."""
    return scaled_product(dy, b.to(dy.dtype), scale), scaled_product(dy.t(), s, scale).to(b.dtype)


def a_grads(x: Tensor, ds: Tensor, a: Tensor, draw: Tensor | None, p: float, dtype: torch.dtype | None = None) -> Tensor:
    """The gradients of A [g r, i], rounded as products are; ``dtype``: what they are given in, if
    not in A's."""
    whole = torch.cat([ds[:, part].t() @ dropped(x, draw, p, index) for index, part in _parts(a.shape[0], draw)])
    return whole.to(dtype or a.dtype)


def input_grad(dys: list[Tensor], ws: list[Tensor], ds: Tensor, a: Tensor, draw: Tensor | None, p: float) -> Tensor:
    """The gradient of x [M, i]: through the adapters, and through the bases, dY W of each."""
    dx: Tensor | None = None
    for index, part in _parts(a.shape[0], draw):
        through = dropped(ds[:, part] @ a[part], draw, p, index)
        dx = through if dx is None else dx.add_(through)
    assert dx is not None
    for dy, w in zip(dys, ws, strict=True):
        dx.addmm_(dy, w)
    return dx


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Rounded once, unlike a product and then its multiple."""
    return torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=scale)


def _parts(num_rows: int, draw: Tensor | None) -> Iterator[tuple[int, slice]]:
    count = 1 if draw is None else draw.shape[0] - 1
    rank = num_rows // count
    return ((index, slice(index * rank, (index + 1) * rank)) for index in range(count))
