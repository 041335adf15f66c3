"""Linears with adapters as one node of autograd: forward and backward in an order of one's choice.

Saved are X and references to weights and adapters, never a mask; ``fused`` also saves S = X A'
where it is small beside X.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ratel.lora.compute import choice, ops
from ratel.lora.compute.graphs import BACKWARD, FORWARD, Given, Size
from ratel.lora.compute.masks import Dropout, threshold

SMALL_SHARE = 32
"""S is saved where X has at least so many times as many columns."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """``a`` [r, i] and ``b`` [j, r] as peft keeps them; the update of W [j, i] is ``scale`` B A."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A linear as it is without its adapter. ``weight`` [j, i]: of a Conv1D, which stores [i, j],
    the transposed view."""

    weight: Tensor
    bias: Tensor | None = None


class _How(NamedTuple):
    """What autograd does not look into."""

    scales: tuple[float, ...]
    p: float
    forward: str
    backward: str


def adapted_linear(x: Tensor, base: Frozen, adapter: Adapter, dropout: Dropout | None = None, graph: str = "auto") -> Tensor:
    """x W' + bias + scale dropout(x) A' B' for x [..., i]; a gradient for x, A and B, and for W and
    bias where they want one."""
    return adapted_linears(x, [base], [adapter], dropout, graph)[0]


def adapted_linears(x: Tensor, bases: Sequence[Frozen], adapters: Sequence[Adapter], dropout: Dropout | None = None,
                    graph: str = "auto") -> tuple[Tensor, ...]:
    """All of some linears that read the same x, in one reading of it where ``graph`` is ``fused``.

    ``dropout`` has a key for each linear, so each drops elements of its own, as peft's do.
    ``graph``: see ``choice.choose``.
    """
    assert len(bases) == len(adapters) and (dropout is None or dropout.draw.shape[0] == 1 + len(bases)), "one of each for each linear"
    if len(adapters) > 1 and len({adapter.rank for adapter in adapters}) > 1:
        return tuple(adapted_linear(x, base, adapter, _of(dropout, index), graph)
                     for index, (base, adapter) in enumerate(zip(bases, adapters, strict=True)))
    draw, p = (dropout.draw, dropout.p) if dropout is not None and threshold(dropout.p) else (None, 0.0)
    forward, backward = _orders(graph, x, bases[0], adapters[0], draw is not None)
    how = _How(tuple([float(adapter.scale) for adapter in adapters]), p, forward, backward)
    tensors = [tensor for base, adapter in zip(bases, adapters, strict=True)
               for tensor in (base.weight, base.bias, adapter.a, adapter.b)]
    if not (torch.is_grad_enabled() or ops.is_watched(x)):
        return _forward(x, draw, how, tensors)[0]  # a node of autograd takes as long as its launches
    return _Adapted.apply(x, draw, how, *tensors)


def _orders(graph: str, x: Tensor, base: Frozen, adapter: Adapter, drops: bool) -> choice.Choice:
    if graph == "auto":
        return choice.FUSED, choice.FUSED
    size = Size(rows=x.numel() // max(1, x.shape[-1]), inputs=x.shape[-1], outputs=base.weight.shape[0], rank=adapter.rank,
                drops=drops, element_bytes=x.element_size())
    return choice.choose(graph, size, x.device, x.dtype)


def _of(dropout: Dropout | None, index: int) -> Dropout | None:
    return None if dropout is None else Dropout(dropout.p, dropout.draw[[0, 1 + index]])


def _forward(x: Tensor, draw: Tensor | None, how: _How, tensors: Sequence[Tensor | None]) \
        -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """The results, all A as they were multiplied, and S. Where ``fused`` computes, A is rounded once
    for all linears and B where kernels read it; other orders get both rounded."""
    flat, parts = _flat(x), _fours(tensors)
    a = _stacked(parts, x.dtype)
    if how.forward == choice.FUSED:
        ys, s = _fused_forward(flat, draw, how, parts, a)
    else:
        ys, s = [FORWARD[how.forward](given) for given in _givens(flat, draw, how, parts, a)], None
    return tuple(ys) if x.dim() == 2 else tuple([y.view(*x.shape[:-1], y.shape[-1]) for y in ys]), a, s


class _Adapted(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Tensor | None, how: _How, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.how = how
        ys, a, s = _forward(x, draw, how, tensors)
        kept = s if s is not None and tensors[2].shape[0] * SMALL_SHARE <= x.shape[-1] else None
        ctx.dtypes = [one.dtype for one in tensors[2::4]]
        ctx.save_for_backward(x, draw, kept, a, *[tensor for w, bias, _, b in _fours(tensors) for tensor in (w, bias, b)])
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, draw, s, a, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        flat, flat_dys = _flat(x), [None if dy is None else _flat(dy) for dy in dys]
        rank = a.shape[0] // len(dys)
        parts = [(*tensors[n:n + 2], None, tensors[n + 2]) for n in range(0, len(tensors), 3)]
        run = _fused_backward if ctx.how.backward == choice.FUSED else _graph_backward
        dx, adapters = run(flat, draw, ctx.how, parts, a, flat_dys, s, needs[0], ctx.dtypes)
        grads: list[Tensor | None] = []
        for index, (dy, (da, db)) in enumerate(zip(flat_dys, adapters, strict=True)):
            wants_w, wants_bias = needs[3 + 4 * index:5 + 4 * index]
            grads += [dy.t() @ flat if wants_w and dy is not None else None,
                      dy.sum(0) if wants_bias and dy is not None else None, da, db]
        return None if dx is None else dx.view(x.shape), None, None, *grads


Part = tuple[Tensor, Tensor | None, Tensor | None, Tensor]
"""W, bias, A (None in backward), B."""
Grads = tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]
"""dX, and dA and dB of each linear."""


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _fours(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [tensors[begin:begin + 4] for begin in range(0, len(tensors), 4)]


def _stacked(parts: list[Part], dtype: torch.dtype) -> Tensor:
    """All A, one below the other."""
    whole = parts[0][2] if len(parts) == 1 else torch.cat([part[2] for part in parts])
    return whole if whole.dtype == dtype else whole.to(dtype)


def _columns(s: Tensor, count: int) -> Sequence[Tensor]:
    return (s,) if count == 1 else s.chunk(count, 1)


def _givens(x: Tensor, draw: Tensor | None, how: _How, parts: list[Part], a: Tensor) -> list[Given]:
    masks = [None if draw is None else partial(_dropped, draw=draw, p=how.p, index=index) for index in range(len(parts))]
    return [Given(x=x, w=w, bias=bias, a=one, b=b.to(x.dtype), scale=scale, mask=mask)
            for (w, bias, _, b), one, scale, mask in zip(parts, a.chunk(len(parts)), how.scales, masks, strict=True)]


def _dropped(x: Tensor, draw: Tensor, p: float, index: int) -> Tensor:
    return ops.dropped(x, draw, p, index)


def _graph_backward(x: Tensor, draw: Tensor | None, how: _How, parts: list[Part], a: Tensor, dys: list[Tensor | None],
                    _: Tensor | None, wants_x: bool, dtypes: list[torch.dtype]) -> Grads:
    total, adapters = None, []
    for given, dy, dtype, part in zip(_givens(x, draw, how, parts, a), dys, dtypes, parts, strict=True):
        if dy is None:
            adapters.append((None, None))
            continue
        da, db, dx = BACKWARD[how.backward].run(given, dy, wants_x)
        adapters.append((da.to(dtype), db.to(part[3].dtype)))
        total = dx if total is None or dx is None else total.add_(dx)
    return total, adapters


def _fused_forward(x: Tensor, draw: Tensor | None, how: _How, parts: list[Part], a: Tensor) -> tuple[list[Tensor], Tensor]:
    call = _caller(x)
    s = call("down", x, a, draw, how.p)
    return [call("linear", x, w, bias, columns, b, scale)
            for columns, (w, bias, _, b), scale in zip(_columns(s, len(parts)), parts, how.scales, strict=True)], s


def _fused_backward(x: Tensor, draw: Tensor | None, how: _How, parts: list[Part], a: Tensor, dys: list[Tensor | None],
                    s: Tensor | None, wants_x: bool, dtypes: list[torch.dtype]) -> Grads:
    """dS and dB in one reading of each dY; then dA, and dX of all linears in one product."""
    call, count = _caller(x), len(parts)
    s = call("down", x, a, draw, how.p) if s is None else s
    ups = [(torch.zeros_like(columns), None) if dy is None else call("up_grads", dy, part[3], columns, scale)
           for dy, part, columns, scale in zip(dys, parts, _columns(s, count), how.scales, strict=True)]
    ds = ups[0][0] if count == 1 else torch.cat([ds for ds, _ in ups], dim=1)
    da = call("a_grads", x, ds, a, draw, how.p, dtypes[0])
    reached = [(dy, part[0]) for dy, part in zip(dys, parts, strict=True) if dy is not None]
    dx = call("input_grad", [dy for dy, _ in reached], [w for _, w in reached], ds, a, draw, how.p) if wants_x else None
    das = da.chunk(count) if count > 1 else (da,)
    return dx, [(None if db is None else da, db) for da, (_, db) in zip(das, ups, strict=True)]


def _caller(x: Tensor) -> Callable[..., Any]:
    return _dispatched if ops.is_watched(x) else ops.run


def _dispatched(name: str, *args: Any) -> Any:
    return getattr(ops, name)(*args)
