"""DoRA (Liu et al., arXiv 2402.09353): the direction of W + s B A, and a length for each output
that is trained.

With the factors f = m / |W + s B A|, the lengths of rows, in which no gradient goes through the
lengths (section 4.3 there), a linear computes f (X W' + s X A' B') + bias. Where dropout is on, its
mask is on all that f has changed, as in peft: X W' + bias + (f - 1) X̂ W' + f s X̂ A' B'.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratel.lora.compute import ops, reference
from ratel.lora.compute.function import Adapter, Frozen
from ratel.lora.compute.masks import Dropout, threshold
from ratel.lora.compute.modules import AdaptedLinear, dropout_of

CHUNK_ELEMENTS = 1 << 24
"""So many elements of a sum W + s B A exist at once where lengths of rows are taken: 64 MiB."""


class DoraLinear(AdaptedLinear):
    """An adapted linear with ``lora_magnitude`` [outputs]. It is computed for itself, and in one
    order of its own."""

    def __init__(self, base: nn.Module, adapter: Adapter, magnitude: Tensor, *, p: float) -> None:
        super().__init__(base, adapter, p=p)
        self.lora_magnitude = nn.Parameter(magnitude)

    def forward(self, x: Tensor) -> Tensor:
        return dora_linear(x, self.base, self.adapter, self.lora_magnitude, dropout_of(self))


def dora_linear(x: Tensor, base: Frozen, adapter: Adapter, magnitude: Tensor, dropout: Dropout | None = None) -> Tensor:
    """For x [..., i], with gradients for x, A, B and the magnitudes [j]; W and bias get none."""
    factors = magnitude / lengths(base.weight, adapter.a, adapter.b, adapter.scale)
    draw, p = (dropout.draw, dropout.p) if dropout is not None and threshold(dropout.p) else (None, 0.0)
    return _Dora.apply(x, draw, p, adapter.scale, base.weight, base.bias, adapter.a, adapter.b, factors)


@torch.no_grad()
def lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The length of each row of W + scale B A, in fp32: [j] for a weight [j, i]. A part of the sum
    exists at a time."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    a, b = a.to(dtype), b.to(dtype)
    parts = [torch.linalg.norm(weight[begin:begin + rows].to(dtype) + scale * (b[begin:begin + rows] @ a), dim=1)
             for begin in range(0, weight.shape[0], rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Dora(torch.autograd.Function):
    """Saved are x, what f multiplies, S, and references."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Tensor | None, p: float, scale: float, w: Tensor, bias: Tensor | None, a: Tensor,
                b: Tensor, f: Tensor) -> Tensor:
        ctx.p, ctx.scale, ctx.dtypes = p, scale, (a.dtype, b.dtype, f.dtype)
        flat, a, b = x.reshape(-1, x.shape[-1]), a.to(x.dtype), b.to(x.dtype)
        more = (f - 1).to(x.dtype)
        s = ops.down(flat, a, draw, p)
        if draw is None:
            y = ops.linear(flat, w, bias, s, b, scale)
            whole = y if bias is None else y - bias
            result = torch.addcmul(y, whole, more)
        else:
            direction = F.linear(ops.dropped(flat, draw, p, 0), w)
            update = reference.scaled_product(s, b.t(), scale)
            result = F.linear(flat, w, bias).addcmul_(direction, more).addcmul_(update, f.to(x.dtype))
            whole = direction.add_(update)
        ctx.save_for_backward(x, draw, s, whole, w, a, b, f)
        return result.view(*x.shape[:-1], result.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, draw, s, whole, w, a, b, f = ctx.saved_tensors
        flat, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        df = (dy * whole).sum(0, dtype=f.dtype)
        scaled = dy * f.to(dy.dtype)
        ds, db = ops.up_grads(scaled, b, s, ctx.scale)
        da = ops.a_grads(flat, ds, a, draw, ctx.p)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ops.input_grad([scaled if draw is None else dy], [w], ds, a, draw, ctx.p)
            if draw is not None:
                dx = dx + ops.dropped((dy * (f - 1).to(dy.dtype)) @ w, draw, ctx.p, 0)
        grads = [grad.to(dtype) for grad, dtype in zip((da, db, df), ctx.dtypes, strict=True)]
        return None if dx is None else dx.view(x.shape), None, None, None, None, None, *grads
