"""Which elements of an adapter's input dropout keeps: a function of a key and of an element's
place, never stored.

A mask depends on nothing that a device, a kernel or a split into micro-batches could change. Its
key is made from the run's seed, the step, the stage and the linear; an element's place is its row
in the whole batch of the step and its column. So a second run of a block, backward, and any number
of micro-batches draw the same mask, on the CPU and in the kernels.

Each row gets 64 random bits: the splitmix64 sequence that begins at the key, at the row's place
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), each column 32 by a
multiplication. An element mixes both by two more, with the constants of the mixer lowbias32
(Wellons, "Hash function prospector", 2018); the second half of the row's bits comes in between, so
that rows with one half alike are not. Philox, the usual generator, takes 25 instructions an element
where this takes eight, and making a mask would take longer than reading the elements that it is for
(docs/lora_compute.md).
"""

import functools
import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
COLUMN0, COLUMN1, COLUMN2 = 0x9E3779B9, 0x7FEB352D, 0x846CA68B
CHUNK_ELEMENTS = 1 << 22
"""The reference makes some three integers of 32 bits for each of so many elements at a time."""


@functools.lru_cache(maxsize=1 << 14)
def mask_key(seed: int, step: int, stage: str | int, linear: str | int) -> int:
    """64 bits, as a signed number: what PyTorch's integers hold. Those of a step are asked for by
    each run of each block in each micro-batch."""
    text = f"{seed}/{step}/{stage}/{linear}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


class Dropout(NamedTuple):
    """The dropout of some linears that read the same input: one probability, a key for each, and
    where the input's rows are."""

    p: float
    draw: Tensor
    """[first row, key, key, ...], 64 bits each, on the CPU. A tensor, and no numbers, because an
    operation's numbers belong to its form, and a form that changes at every step would be traced
    and compiled at every step. The first row is that of this input in the step's whole batch: rows
    are tokens, or whatever is left when all dimensions but the last are taken as one."""

    @classmethod
    def of(cls, p: float, keys: Iterable[int], first_row: int = 0) -> "Dropout":
        assert 0 <= p < 1, p
        return cls(p, torch.from_numpy(np.array((first_row, *keys), np.int64)))


def threshold(p: float) -> int:
    """An element is kept where its 32 bits, as a number without sign, are at least this."""
    return min(round(p * 2**32), 2**32 - 1)


class Group(NamedTuple):
    """As many linears as one launch of a kernel takes: the number of the first, how many, and what
    the kernel gets of their keys."""

    begin: int
    count: int
    words: tuple[int, ...]

    def part(self, rank: int) -> slice:
        return slice(self.begin * rank, (self.begin + self.count) * rank)


@functools.lru_cache(maxsize=1024)
def kernel_groups(draw: tuple[int, ...], most: int) -> tuple[Group, ...]:
    """``draw``: Dropout's numbers. ``most``: linears in one launch."""
    first_row, *keys = draw
    return tuple(Group(begin, len(some), kernel_words(first_row, some, most))
                 for begin in range(0, len(keys), most) if (some := keys[begin:begin + most]))


def kernel_words(first_row: int, keys: list[int], most: int) -> tuple[int, ...]:
    """The first row, and two signed halves of 32 bits of each key, up to ``most``."""
    halves = [half for key in [*keys, *[0] * most][:most] for half in (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF)]
    return first_row, *[_signed(half, 32) for half in halves]


def kernel_threshold(p: float) -> int:
    """A kernel's numbers have a sign."""
    return _signed(threshold(p), 32)


def keep_mask(num_rows: int, num_columns: int, key: int, p: float, first_row: int = 0,
              device: torch.device | str = "cpu") -> Tensor:
    """[num_rows, num_columns], True where kept: the reference, which the kernels agree with bit for
    bit."""
    low, high = _row_words(num_rows, key, first_row, device)
    columns = _column_words(num_columns, device)
    kept = torch.empty(num_rows, num_columns, dtype=torch.bool, device=device)
    step = max(1, CHUNK_ELEMENTS // max(1, num_columns))
    for begin in range(0, num_rows, step):
        part = slice(begin, begin + step)
        kept[part] = _kept(low[part, None], high[part, None], columns, p)
    return kept


def masked(x: Tensor, key: int, p: float, first_row: int = 0) -> Tensor:
    """Dropout's result for x [rows, columns]: kept elements times 1 / (1 - p), in x's dtype."""
    if not threshold(p):
        return x
    kept = keep_mask(*x.shape, key, p, first_row, x.device)
    return torch.where(kept, x * (1 / (1 - p)), 0)


def _row_words(num_rows: int, key: int, first_row: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    z = torch.arange(first_row, first_row + num_rows, dtype=torch.int64, device=device) * _signed(GOLDEN, 64) + key
    z = (z ^ _shifted(z, 30, 64)) * _signed(MIX1, 64)
    z = (z ^ _shifted(z, 27, 64)) * _signed(MIX2, 64)
    z = z ^ _shifted(z, 31, 64)
    return z.to(torch.int32) | 1, (z >> 32).to(torch.int32)


def _column_words(num_columns: int, device: torch.device | str) -> Tensor:
    x = (torch.arange(num_columns, dtype=torch.int32, device=device) + 1) * _signed(COLUMN0, 32)
    x = (x ^ _shifted(x, 16, 32)) * _signed(COLUMN1, 32)
    return x ^ _shifted(x, 15, 32)


def _kept(low: Tensor, high: Tensor, columns: Tensor, p: float) -> Tensor:
    x = low * columns + high
    x ^= _shifted(x, 16, 32)
    x *= _signed(COLUMN2, 32)
    x ^= -2**31  # order without sign is order with sign after this
    return x >= threshold(p) - 2**31


def _shifted(x: Tensor, by: int, width: int) -> Tensor:
    """To the right, with zeros coming in: PyTorch's shift brings the sign in."""
    return (x >> by) & ((1 << (width - by)) - 1)


def _signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) else value
