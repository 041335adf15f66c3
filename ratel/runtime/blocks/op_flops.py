"""Floating-point operations of one operator call, and which operators are worth keeping the result
of."""

from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

_GROUPED = "aten::_grouped_mm"
_ADAPTED = "ratel_lora::linear"
_WITH_ADDEND = ("aten::addmm", "aten::baddbmm")
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", _GROUPED, _ADAPTED}


def is_attention(func: Any) -> bool:
    return func._schema.name.startswith("aten::_scaled_dot_product")


def is_expensive(func: Any) -> bool:
    """Matrix products, attention and convolutions. The rest of a block is bound by memory: keeping
    its results would cost more traffic than it saves."""
    return func._schema.name in _PRODUCTS or is_attention(func)


def num_stored(func: Any) -> int:
    """How many of its results hold data for backward; attention's others are seeds and limits, a
    few bytes each."""
    return 2 if is_attention(func) else 1


def gradient_flops_of(func: Any, args: tuple, flops: float) -> float:
    """The FLOPs of its backward pass, given its own: as many for each factor that wants a gradient."""
    if not flops or is_attention(func):
        return 2 * flops
    if func._schema.name == _ADAPTED:  # dX of both products; B's gradient. The weight is frozen, S is made beside
        rows, b = args[0].shape[0], args[4]
        return flops + 2.0 * rows * b.numel()
    factors = args[1:3] if func._schema.name in _WITH_ADDEND else args[:2]
    return flops * sum(isinstance(x, Tensor) and x.requires_grad for x in factors)


def flops_of(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> float:
    """A multiply and an add are two; 0 for what is not expensive. A causal mask is not taken off,
    as is usual."""
    if not is_expensive(func):
        return 0.0
    if is_attention(func):
        query, key, value = args[:3]
        return 2.0 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    if func._schema.name == _GROUPED:  # rows of the left one in groups, each against one matrix
        return 2.0 * args[0].shape.numel() * args[1].shape[-1]
    if func._schema.name == _ADAPTED:  # x w' + s b'; its adapter's first product is not worth keeping
        x, w, _, s, b = args[:5]
        return 2.0 * x.shape[0] * (w.numel() + b.numel())
    return float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result))

