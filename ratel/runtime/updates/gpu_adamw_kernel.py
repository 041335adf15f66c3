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
from ratel.planner.formats import MOMENT_BLOCK
from ratel.store.encodings import LARGEST_MOMENT, LARGEST_ROOT

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


@triton.jit
def _step(largest, LIMIT: tl.constexpr, MOST: tl.constexpr):
    """What one step of a block's codes is, and its inverse."""
    step = _div(tl.minimum(largest, LIMIT), tl.full(largest.shape, MOST, tl.float32))
    is_normal = step >= 1.1754943508222875e-38
    inverse = _div(tl.full(largest.shape, 1.0, tl.float32), tl.where(is_normal, step, 1.0))
    return tl.where(is_normal, step, 0.0), tl.where(is_normal, inverse, 0.0)


@triton.jit
def _master(hi_ptr, lo_ptr, at, mask):
    upper = tl.load(hi_ptr + at, mask=mask, other=0).to(tl.int32)
    bits = (upper << 16) + tl.load(lo_ptr + at, mask=mask, other=0).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _store_master(hi_ptr, lo_ptr, at, master, mask):
    bits = master.to(tl.int32, bitcast=True)
    tl.store(hi_ptr + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=mask)
    tl.store(lo_ptr + at, bits.to(tl.int16), mask=mask)


@triton.jit
def _updated(master, grad, m, v, grad_scale, coefficient, beta2, one_minus_beta2, bias_correction2_sqrt, eps,
             neg_step_size, decay, HIGH_WEIGHT: tl.constexpr):
    """The new master, moments, and the root of the second."""
    master = _mul(master, decay)
    grad = _mul(grad.to(tl.float32), grad_scale)
    difference = _sub(grad, m)
    if HIGH_WEIGHT:
        m = _fma(difference, coefficient, grad)
    else:
        m = _fma(difference, coefficient, m)
    v = _fma(_mul(grad, one_minus_beta2), grad, _mul(v, beta2))
    root = _sqrt(v)
    denominator = _add(_div(root, bias_correction2_sqrt), eps)
    return _add(master, _div(_mul(m, neg_step_size), denominator)), m, v, root


@triton.jit(do_not_specialize=["key", "second_key", "first"])
def adamw_kernel(hi_ptr, lo_ptr, m_ptr, v_ptr, grad_ptr, num_elements, grad_scale, coefficient, beta2, one_minus_beta2,
                 bias_correction2_sqrt, eps, neg_step_size, decay, key, second_key, first, HIGH_WEIGHT: tl.constexpr,
                 BF16_MOMENTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_elements
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
    m, v = _moments(m_ptr, at, mask, BF16_MOMENTS), _moments(v_ptr, at, mask, BF16_MOMENTS)
    master, m, v, _ = _updated(_master(hi_ptr, lo_ptr, at, mask), grad, m, v, grad_scale, coefficient, beta2,
                               one_minus_beta2, bias_correction2_sqrt, eps, neg_step_size, decay, HIGH_WEIGHT)
    if BF16_MOMENTS:
        noise = _draw(at.to(tl.uint32) + first.to(tl.uint32), key, second_key)
        tl.store(m_ptr + at, _rounded(m, noise & 0xffff), mask=mask)
        tl.store(v_ptr + at, _rounded(v, noise >> 16), mask=mask)
    else:
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)
    _store_master(hi_ptr, lo_ptr, at, master, mask)


@triton.jit(do_not_specialize=["key", "second_key", "first"])
def adamw_blocks_kernel(hi_ptr, lo_ptr, m_ptr, v_ptr, m_step_ptr, v_step_ptr, grad_ptr, num_elements, grad_scale,
                        coefficient, beta2, one_minus_beta2, bias_correction2_sqrt, eps, neg_step_size, decay, key,
                        second_key, first, HIGH_WEIGHT: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
                        MOST_MOMENT: tl.constexpr, MOST_ROOT: tl.constexpr):
    """BLOCKS blocks of SIZE moments, each of which has SIZE + 4 bytes, the last four being its
    step."""
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    lanes = tl.arange(0, SIZE)[None, :]
    at, codes_at, step_at = blocks * SIZE + lanes, blocks * (SIZE + 4) + lanes, (blocks + 1) * (SIZE // 4 + 1) - 1
    mask, of_block = at < num_elements, blocks * SIZE < num_elements
    m_codes, v_codes = tl.load(m_ptr + codes_at, mask=mask, other=0), tl.load(v_ptr + codes_at, mask=mask, other=0)
    m = _mul(m_codes.to(tl.float32), tl.load(m_step_ptr + step_at, mask=of_block, other=0.0))
    root = _mul(v_codes.to(tl.float32), tl.load(v_step_ptr + step_at, mask=of_block, other=0.0))
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
    master, m, v, root = _updated(_master(hi_ptr, lo_ptr, at, mask), grad, m, _mul(root, root), grad_scale, coefficient,
                                  beta2, one_minus_beta2, bias_correction2_sqrt, eps, neg_step_size, decay, HIGH_WEIGHT)
    _store_master(hi_ptr, lo_ptr, at, master, mask)
    noise = _draw(at.to(tl.uint32) + first.to(tl.uint32), key, second_key)
    m_step, m_inverse = _step(tl.max(tl.abs(m), 1)[:, None], MOST_MOMENT, 127.0)
    v_step, v_inverse = _step(tl.max(root, 1)[:, None], MOST_ROOT, 255.0)
    scaled = tl.minimum(tl.maximum(_mul(m, m_inverse), -127.0), 127.0)
    m_code = _add(scaled, (noise & 0xffff).to(tl.float32) * (1 / 65536) + 127.0).to(tl.int32) - 127
    v_code = _add(tl.minimum(_mul(root, v_inverse), 255.0), (noise >> 16).to(tl.float32) * (1 / 65536)).to(tl.int32)
    tl.store(m_ptr + codes_at, m_code.to(tl.int8), mask=mask)
    tl.store(v_ptr + codes_at, tl.maximum(v_code, (root > 0).to(tl.int32)).to(tl.uint8), mask=mask)
    tl.store(m_step_ptr + step_at, m_step, mask=of_block)
    tl.store(v_step_ptr + step_at, v_step, mask=of_block)


def triton_update(planes: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], k: op_ds.AdamCoefficients,
                  decay: float, rounding: op_ds.Rounding | None) -> None:
    hi, lo, m, v, grad = planes
    draws = (0, 0, 0) if rounding is None else tuple(map(_as_int32, (*rounding.keys, rounding.counter)))
    high_weight = k.lerp_weight >= 0.5
    coefficient = op_ds.to_fp32(k.lerp_weight - 1) if high_weight else k.lerp_weight
    scalars = (hi.numel(), k.grad_scale, coefficient, k.beta2, k.one_minus_beta2, k.bias_correction2_sqrt, k.eps,
               k.neg_step_size, decay, *draws)
    options = dict(HIGH_WEIGHT=high_weight, num_warps=4, enable_fp_fusion=False)
    grid = (triton.cdiv(hi.numel(), BLOCK),)
    with torch.cuda.device(hi.device):
        if m.dtype == torch.uint8:
            steps = m.view(torch.float32), v.view(torch.float32)
            adamw_blocks_kernel[grid](hi.view(torch.int16), lo, m.view(torch.int8), v, *steps, grad, *scalars,
                                      BLOCKS=BLOCK // MOMENT_BLOCK, SIZE=MOMENT_BLOCK, MOST_MOMENT=LARGEST_MOMENT,
                                      MOST_ROOT=LARGEST_ROOT, **options)
        else:
            m, v = (p.view(torch.int16) if p.dtype == torch.bfloat16 else p for p in (m, v))
            adamw_kernel[grid](hi.view(torch.int16), lo, m, v, grad, *scalars, BF16_MOMENTS=rounding is not None,
                               BLOCK=BLOCK, **options)


def _as_int32(word: int) -> int:
    """A larger argument would be of another type, and the kernel compiled once more."""
    return word - ((word & 0x80000000) << 1)
