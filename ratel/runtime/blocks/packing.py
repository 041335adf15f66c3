"""Dense tensors one after the other in one buffer of bytes, and found again there with their shapes
and strides."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ratel.planner.checkpoints import PART_ALIGN
from ratel.units import align_up


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor in a buffer. ``begin`` in bytes."""

    begin: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def packed_bytes(sizes: list[int]) -> int:
    return sum(align_up(num_bytes, PART_ALIGN) for num_bytes in sizes[:-1]) + sizes[-1]


def lay_out_parts(tensors: list[Tensor], begin: int = 0) -> tuple[list[Part], int]:
    """Places for all of them from ``begin`` on, and the bytes that they take. Each must fill one
    range of memory."""
    parts, sizes = [], []
    for tensor in tensors:
        parts.append(Part(begin + packed_bytes([*sizes, 0]), tensor.shape, tensor.stride(), tensor.dtype))
        sizes.append(tensor.numel() * tensor.element_size())
    return parts, packed_bytes(sizes)


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def part_of(buffer: Tensor, part: Part) -> Tensor:
    """The tensor's place in a buffer of bytes, in its shape and strides."""
    num_bytes = part.shape.numel() * part.dtype.itemsize
    return buffer[part.begin : part.begin + num_bytes].view(part.dtype).as_strided(part.shape, part.stride)
