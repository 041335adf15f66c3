"""The Triton kernel of ``gpu_adamw``. Importing this module needs Triton.

Every operation that rounds is a PTX instruction of its own with ``.rn`` and without ``.ftz``: the
compiler can then neither fuse a multiplication with an addition nor flush denormals, both of which
Triton's own operators may do (its precise square root and division go through a library that it
compiles with flush-to-zero).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ratel.native import op_ds

BLOCK = 1024


@triton.jit
def _add(a, b):
    return tl.inline_asm_elementwise("add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sub(a, b):
    return tl.inline_asm_elementwise("sub.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _mul(a, b):
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _div(a, b):
    return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sqrt(a):
    return tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _fma(a, b, c):
    return tl.inline_asm_elementwise("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32,
                                     is_pure=True, pack=1)


@triton.jit
def _draw(number, key, second_key):
    """32 random bits for each element, as docs/optimizer.md has them."""
    x = number ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85ebca6b + second_key.to(tl.uint32)
    x = (x ^ (x >> 13)) * 0xc2b2ae35
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, noise):
    """bf16 bits, as int16, of fp32 numbers, with 16 random bits to carry."""
    bits = x.to(tl.int32, bitcast=True)
    carry = tl.where((bits & 0x7fffffff) < 0x7f7f0000, noise.to(tl.int32), 0)
    return ((bits + carry) >> 16).to(tl.int16)


@triton.jit
def _moments(pointer, at, mask, IS_BF16: tl.constexpr):
    if IS_BF16:
        upper = tl.load(pointer + at, mask=mask, other=0).to(tl.int32)
        return (upper << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["key", "second_key", "first"])
def adamw_kernel(hi_ptr, lo_ptr, m_ptr, v_ptr, grad_ptr, num_elements, grad_scale, coefficient, beta2, one_minus_beta2,
                 bias_correction2_sqrt, eps, neg_step_size, decay, key, second_key, first, HIGH_WEIGHT: tl.constexpr,
                 BF16_MOMENTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_elements
    upper = tl.load(hi_ptr + at, mask=mask, other=0).to(tl.int32)
    bits = (upper << 16) + tl.load(lo_ptr + at, mask=mask, other=0).to(tl.int32)
    master = _mul(bits.to(tl.float32, bitcast=True), decay)
    grad = _mul(tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32), grad_scale)
    m = _moments(m_ptr, at, mask, BF16_MOMENTS)
    v = _moments(v_ptr, at, mask, BF16_MOMENTS)
    difference = _sub(grad, m)
    if HIGH_WEIGHT:
        m = _fma(difference, coefficient, grad)
    else:
        m = _fma(difference, coefficient, m)
    v = _fma(_mul(grad, one_minus_beta2), grad, _mul(v, beta2))
    denominator = _add(_div(_sqrt(v), bias_correction2_sqrt), eps)
    master = _add(master, _div(_mul(m, neg_step_size), denominator))
    bits = master.to(tl.int32, bitcast=True)
    if BF16_MOMENTS:
        noise = _draw(at.to(tl.uint32) + first.to(tl.uint32), key, second_key)
        tl.store(m_ptr + at, _rounded(m, noise & 0xffff), mask=mask)
        tl.store(v_ptr + at, _rounded(v, noise >> 16), mask=mask)
    else:
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)
    tl.store(hi_ptr + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=mask)
    tl.store(lo_ptr + at, bits.to(tl.int16), mask=mask)


def triton_update(planes: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], k: op_ds.AdamCoefficients,
                  decay: float, rounding: op_ds.Rounding | None) -> None:
    hi, lo, m, v, grad = planes
    draws = (0, 0, 0) if rounding is None else tuple(map(_as_int32, (*rounding.keys, rounding.counter)))
    if rounding is not None:
        m, v = m.view(torch.int16), v.view(torch.int16)
    high_weight = k.lerp_weight >= 0.5
    coefficient = op_ds.to_fp32(k.lerp_weight - 1) if high_weight else k.lerp_weight
    grid = (triton.cdiv(hi.numel(), BLOCK),)
    with torch.cuda.device(hi.device):
        adamw_kernel[grid](hi.view(torch.int16), lo, m, v, grad, hi.numel(), k.grad_scale, coefficient, k.beta2,
                           k.one_minus_beta2, k.bias_correction2_sqrt, k.eps, k.neg_step_size, decay,
                           *draws, HIGH_WEIGHT=high_weight, BF16_MOMENTS=rounding is not None, BLOCK=BLOCK, num_warps=4,
                           enable_fp_fusion=False)


def _as_int32(word: int) -> int:
    """A larger argument would be of another type, and the kernel compiled once more."""
    return word - ((word & 0x80000000) << 1)
