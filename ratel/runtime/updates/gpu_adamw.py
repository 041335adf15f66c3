"""AdamW on planes that live where torch lives, bit for bit what ``op_ds`` does to planes in host
memory.

Two paths. ``reference`` uses plain torch operations that round once each and runs on any device;
``triton`` is one kernel that passes over the memory once. Both follow the formula of
docs/optimizer.md, operation by operation.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.native import op_ds
from ratel.planner.formats import FORMATS, MOMENT_BLOCK
from ratel.store.encodings import BLOCK_BYTES, CODECS, square_root

PATHS = ("auto", "triton", "reference")
REFERENCE_CHUNK = 1 << 20
"""Elements, a multiple of a block. The reference makes some ten fp64 temporaries of this length."""

_CODECS = [CODECS[FORMATS["8bit"]["bf16"].encoding(plane).name] for plane in ("m", "v")]

Planes = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Update = Callable[[Planes, op_ds.AdamCoefficients, float, op_ds.Rounding | None], None]
_log = logging.getLogger(__name__)


def adamw_(hi: Tensor, lo: Tensor, m: Tensor, v: Tensor, grad: Tensor, *, lr: float, beta1: float, beta2: float,
           eps: float, step: int, grad_scale: float = 1.0, ranges: list[tuple[int, float]] | None = None,
           rounding: op_ds.Rounding | None = None, path: str = "auto") -> None:
    """One AdamW step in place. All tensors 1-D, contiguous, of one length and device.

    ``hi`` is bf16, ``lo`` int16 (together the fp32 master), ``m`` and ``v`` are fp32, or with
    ``rounding`` bf16, or uint8 in blocks, ``grad`` is bf16 or fp32. ``ranges`` are (end element,
    weight decay) as in ``op_ds.Pool.adamw``. ``path="auto"`` takes Triton on an NVIDIA GPU where it
    can be imported; a forced path that is impossible raises RatelError.
    """
    planes = (hi, lo, m, v, grad)
    _check_planes(planes, rounding is not None)
    ranges = [(hi.numel(), 0.0)] if ranges is None else ranges
    op_ds.check_ranges(ranges, hi.numel())
    coefficients = op_ds.adam_coefficients(lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step,
                                           grad_scale=grad_scale)
    update = choose_update(hi.device, path)
    for begin, end, weight_decay in _spans(ranges):
        update(_part(planes, begin, end), coefficients, op_ds.decay_factor(lr, weight_decay), _from(rounding, begin))


def choose_update(device: torch.device, path: str = "auto") -> Update:
    """The function that updates a span of planes on ``device``."""
    if path not in PATHS:
        raise RatelError("unknown way to update on the GPU", field="path", value=path,
                         remedy=f"Choose one of {', '.join(PATHS)}")
    if path == "reference" or (path == "auto" and not _triton_serves(device.type)):
        return _reference_update
    if not _triton_serves(device.type):
        raise RatelError("Triton cannot update planes here", field="path", value=f"{path} on {device}",
                         remedy="Use an NVIDIA GPU and install the package triton, or choose reference")
    from ratel.runtime.updates.gpu_adamw_kernel import triton_update

    return triton_update


@functools.cache
def _triton_serves(device_type: str) -> bool:
    """Asked once per kind of device, so that the choice is logged once. An AMD GPU cannot run the
    kernel's PTX."""
    if device_type != "cuda" or torch.version.cuda is None:
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        _log.warning("triton cannot be imported: optimizer states on the GPU are updated by the slower torch path")
        return False
    return True


def _check_planes(planes: Planes, are_rounded: bool) -> None:
    hi, lo, m, v, grad = planes
    moments = m.numel() if m.dtype != torch.uint8 else m.numel() // BLOCK_BYTES * MOMENT_BLOCK
    assert hi.dtype == torch.bfloat16 and lo.dtype == torch.int16, (hi.dtype, lo.dtype)
    assert m.dtype == v.dtype and m.dtype in ((torch.bfloat16, torch.uint8) if are_rounded else (torch.float32,)), m.dtype
    assert grad.dtype in (torch.bfloat16, torch.float32), grad.dtype
    assert lo.numel() == grad.numel() == moments == hi.numel() and m.numel() == v.numel(), [p.numel() for p in planes]
    assert all(p.dim() == 1 and p.is_contiguous() and p.device == hi.device for p in planes)


def _part(planes: Planes, begin: int, end: int) -> Planes:
    """The planes of some elements: whole blocks, where moments have 8 bits."""
    hi, lo, m, v, grad = planes
    if m.dtype == torch.uint8:
        assert begin % MOMENT_BLOCK == end % MOMENT_BLOCK == 0, (begin, end)
        m, v = (p[begin // MOMENT_BLOCK * BLOCK_BYTES : end // MOMENT_BLOCK * BLOCK_BYTES] for p in (m, v))
    else:
        m, v = m[begin:end], v[begin:end]
    return hi[begin:end], lo[begin:end], m, v, grad[begin:end]


def _spans(ranges: list[tuple[int, float]]) -> Iterator[tuple[int, int, float]]:
    begin = 0
    for end, weight_decay in ranges:
        if begin < end:
            yield begin, end, weight_decay
        begin = end


def _from(rounding: op_ds.Rounding | None, begin: int) -> op_ds.Rounding | None:
    """The draws of what begins ``begin`` elements later."""
    return rounding and replace(rounding, first=rounding.first + begin)


def _reference_update(planes: Planes, k: op_ds.AdamCoefficients, decay: float, rounding: op_ds.Rounding | None) -> None:
    for begin in range(0, planes[0].numel(), REFERENCE_CHUNK):
        hi, lo, m, v, grad = _part(planes, begin, min(begin + REFERENCE_CHUNK, planes[0].numel()))
        if rounding is None:
            _reference_chunk(hi, lo, m, v, grad, k, decay)
            continue
        codecs = _CODECS if m.dtype == torch.uint8 else None
        exact = [codec.decode(p) for codec, p in zip(codecs, (m, v))] if codecs else [m.float(), v.float()]
        _reference_chunk(hi, lo, *exact, grad, k, decay)
        words = draws(_from(rounding, begin), hi.numel(), hi.device)
        for number, (values, noise, out) in enumerate(zip(exact, (words & 0xffff, words >> 16), (m, v))):
            if codecs:
                codecs[number].encode(values, noise.float() / 65536, out)
            else:
                round_stochastically(values, noise, out)


def draws(rounding: op_ds.Rounding, count: int, device: torch.device) -> Tensor:
    """32 random bits for each of so many elements, as int64: MurmurHash3's last steps with a key
    before and one between its multiplications (docs/optimizer.md)."""
    low, high = rounding.keys
    x = (torch.arange(count, device=device) + rounding.counter & 0xffffffff) ^ low
    x = (x ^ x >> 16) * 0x85ebca6b + high & 0xffffffff
    x = (x ^ x >> 13) * 0xc2b2ae35 & 0xffffffff
    return x ^ x >> 16


def round_stochastically(values: Tensor, noise: Tensor, out: Tensor) -> None:
    """fp32 to bf16, away from zero where 16 random bits carry. From bf16's largest number on, and
    for what is not finite, bits are cut off."""
    bits = values.view(torch.int32)
    carries = (bits & 0x7fffffff) < 0x7f7f0000
    out.view(torch.int16).copy_(bits + torch.where(carries, noise, 0).int() >> 16)


def _reference_chunk(hi: Tensor, lo: Tensor, m: Tensor, v: Tensor, grad: Tensor,
                     k: op_ds.AdamCoefficients, decay: float) -> None:
    scaled = grad.float() * k.grad_scale
    master = merge_master(hi, lo) * decay
    if k.lerp_weight < 0.5:
        m.copy_(fma(torch.full_like(m, k.lerp_weight), scaled - m, m))
    else:
        m.copy_(fma(torch.full_like(m, k.lerp_weight) - 1, scaled - m, scaled))
    v.copy_(fma(scaled * k.one_minus_beta2, scaled, v * k.beta2))
    # A tensor and not a number: by a number, torch on CUDA multiplies with the rounded reciprocal.
    root = square_root(v) / torch.full_like(v, k.bias_correction2_sqrt)
    split_master(master + (m * k.neg_step_size) / (root + k.eps), hi, lo)


def merge_master(hi: Tensor, lo: Tensor) -> Tensor:
    """fp32 from its planes, bit for bit."""
    return ((hi.view(torch.int16).int() << 16) + lo).view(torch.float32)


def split_master(master: Tensor, hi: Tensor, lo: Tensor) -> None:
    """Write fp32 into its planes: ``hi`` rounded half up on the bits, ``lo`` the remainder."""
    bits = master.view(torch.int32)
    hi.view(torch.int16).copy_((bits + 0x8000) >> 16)
    lo.copy_(bits)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of fp32 tensors, rounded once.

    The product is exact in fp64. Rounding the fp64 sum to fp32 would round twice, so the sum is
    first rounded to odd: where it was inexact and its last bit is even, it moves one fp64 ulp
    towards the exact value. With two spare bits or more, rounding from there is rounding the exact
    sum (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    product_part = total - addend
    error = (product - product_part) + (addend - (total - product_part))  # exact (Knuth's two-sum)
    bits = total.view(torch.int64)
    away = (error > 0) == (total > 0)  # growing in magnitude is the next larger integer, whatever the sign
    inexact = (error > 0) | (error < 0)  # false for NaN: an infinite sum has no error term
    odd = torch.where(inexact & ((bits & 1) == 0), torch.where(away, bits + 1, bits - 1), bits)
    return odd.view(torch.float64).float()
