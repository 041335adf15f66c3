"""What numbers of a plane are in memory, by the name of their encoding (`ratel.planner.formats`), and
how those in blocks become fp32 and back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ratel.native import op_ds
from ratel.planner.formats import MOMENT_BLOCK, Encoding

DTYPES = {"bf16": torch.bfloat16, "int16": torch.int16, "fp32": torch.float32, "int8 in blocks": torch.uint8,
          "uint8 roots in blocks": torch.uint8}
"""Those in blocks are bytes: codes, and scales among them."""

BLOCK_BYTES = MOMENT_BLOCK + 4
RECODED_ELEMENTS = 1 << 18
"""That go from one encoding to another at once, in whole blocks: what lies between takes some 30
bytes an element, of which plans know nothing."""
LARGEST_MOMENT, LARGEST_ROOT = 3.4e38, 1.8e19
"""What the largest numbers of a block are taken to be at most."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    decode: Callable[[Tensor], Tensor]
    """Stored bytes to fp32."""
    encode: Callable[[Tensor, "Tensor | float", Tensor], None]
    """``(values, noise, out)``: fp32 rounded by noise from 0 to 1, a half being to nearest, into
    bytes."""


def to_fp32(stored: Tensor, encoding: Encoding) -> Tensor:
    codec = CODECS.get(encoding.name)
    return stored.float() if codec is None else codec.decode(stored)


def store_fp32(values: Tensor, encoding: Encoding, out: Tensor) -> None:
    """Round fp32 numbers to nearest, to what they are stored as."""
    codec = CODECS.get(encoding.name)
    if codec is None:
        out.copy_(values)
    else:
        codec.encode(values, 0.5, out)


def recode(stored: Tensor, own: Encoding, wanted: Encoding, out: Tensor) -> None:
    """What is stored in one encoding, rounded to nearest, in another."""
    count = own.count(stored.numel())
    for begin in range(0, count, RECODED_ELEMENTS):
        end = min(begin + RECODED_ELEMENTS, count)
        values = to_fp32(stored[own.place(begin) : own.place(end)], own)
        store_fp32(values, wanted, out[wanted.place(begin) : wanted.place(end)])


def _parts(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Views: codes, and the step of a block's codes as fp32."""
    return stored.view(-1, BLOCK_BYTES)[:, :MOMENT_BLOCK], stored.view(torch.float32).view(-1, BLOCK_BYTES // 4)[:, -1:]


def _decode_moment(stored: Tensor) -> Tensor:
    codes, step = _parts(stored)
    return (codes.view(torch.int8).float() * step).flatten()


def _decode_root(stored: Tensor) -> Tensor:
    codes, step = _parts(stored)
    return (codes.float() * step).square_().flatten()


def _encode_moment(values: Tensor, noise: Tensor | float, out: Tensor) -> None:
    codes, step = _parts(out)
    scaled = _scaled(values.view(-1, MOMENT_BLOCK), step, LARGEST_MOMENT, 127).clamp(-127, 127)
    codes.copy_((scaled + (_by_block(noise) + 127)).int() - 127 & 0xff)


def _encode_root(values: Tensor, noise: Tensor | float, out: Tensor) -> None:
    """What is not zero does not become zero: it is divided by."""
    codes, step = _parts(out)
    root = square_root(values).view(-1, MOMENT_BLOCK)
    scaled = _scaled(root, step, LARGEST_ROOT, 255).clamp_max(255)
    codes.copy_(torch.maximum((scaled + _by_block(noise)).int(), (root > 0).int()))


def _by_block(noise: Tensor | float) -> Tensor | float:
    return noise if isinstance(noise, float) else noise.view(-1, MOMENT_BLOCK)


def _scaled(values: Tensor, to_step: Tensor, limit: float, most: int) -> Tensor:
    """Numbers in steps of their blocks' codes, the largest of a block being ``most``. Below normal
    numbers a step is zero, and with it all that is stored."""
    # Tensors and not numbers: by a number, torch on CUDA multiplies with the rounded reciprocal.
    largest = values.abs().amax(1, keepdim=True).clamp_max(op_ds.to_fp32(limit))
    step = largest / torch.full_like(largest, most)
    is_normal = step >= torch.finfo(torch.float32).tiny
    to_step.copy_(torch.where(is_normal, step, 0))
    return values * torch.where(is_normal, torch.ones_like(step) / step, 0)


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded fp32 square root, which torch's own is not on the CPU.

    The fp64 root of an fp32 number is further from any fp32 rounding boundary (2^-51, relative)
    than its own error.
    """
    return x.double().sqrt().float()


CODECS = {"int8 in blocks": Codec(decode=_decode_moment, encode=_encode_moment),
          "uint8 roots in blocks": Codec(decode=_decode_root, encode=_encode_root)}
"""Encodings that torch has no dtype for."""
