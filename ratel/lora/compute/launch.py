"""Launches of the adapter's kernels, and what shape of block each takes. Importing this module
needs Triton.

The functions are those of ``reference``, with the same arguments and results.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ratel.lora.compute import kernels, reference
from ratel.lora.compute.masks import threshold

MOST_RANK = 64
"""Above it a second reading of dY or x costs less than the parts of sums that one reading would
leave to be added."""
PROGRAMS = 264
"""Twice the multiprocessors of an H200: sums over rows are split among so many programs or a few
more."""
SUM_BLOCK = 1024


class Blocks(NamedTuple):
    """Of one program: rows and columns of what it reads at once, warps, loads in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


def blocks_of(kernel: str, ranks: int, masked: bool) -> Blocks:
    """``ranks``: padded, of all linears of a launch."""
    if kernel == "down":
        return Blocks(64, 128, 4, 4)
    if kernel == "up_grads":
        return Blocks(64, 256 if ranks <= 32 else 128, 8, 3)
    return Blocks(64, 128 if ranks <= 64 else 64, 8 if masked or ranks > 32 else 4, 3)


def can(x: Tensor) -> bool:
    """Whether the kernels take inputs like this one: others are computed by the reference."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.numel() > 0


def dropped(x: Tensor, draw: Tensor | None, p: float, index: int = 0) -> Tensor:
    if draw is None:
        return x
    x, out = _rows_whole(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first_row, *keys = draw.tolist()
    grid = (triton.cdiv(x.shape[0], 16), triton.cdiv(x.shape[1], 256))
    with torch.cuda.device_of(x):
        kernels.dropped_kernel[grid](x, out, *x.shape, x.stride(0), first_row, _signed(threshold(p)), 1 - p, *_halves(keys[index:])[:2],
                                     BM=16, BN=256, num_warps=4)
    return out


def down(x: Tensor, a: Tensor, draw: Tensor | None, p: float) -> Tensor:
    """x from memory once, whatever the number of linears."""
    x, a = _rows_whole(x), a.contiguous()
    s = x.new_empty(x.shape[0], a.shape[0])
    for first, part, group in _groups(a.shape[0], draw):
        _down(x, a[part], s[:, part], first, group, p)
    return s


def _down(x: Tensor, a: Tensor, s: Tensor, first_row: int, keys: list[int], p: float) -> None:
    count = max(1, len(keys))
    rank, (num_rows, num_inputs) = a.shape[0] // count, x.shape
    blocks = blocks_of("down", _padded(rank), bool(keys))
    row_blocks = triton.cdiv(num_rows, blocks.rows) * count
    splits = max(1, min(8, PROGRAMS // row_blocks, num_inputs // (2 * blocks.columns)))
    grid = (row_blocks, splits)
    parts = s if splits == 1 else x.new_empty(splits, num_rows, a.shape[0], dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernels.down_kernel[grid](
            x, a, parts, num_rows, num_inputs, x.stride(0), parts.stride(-2), 0 if splits == 1 else parts.stride(0), first_row,
            _signed(threshold(p)), 1 / (1 - p) if keys else 1.0, *_halves(keys), LINEARS=count, RANK=rank, R=_padded(rank),
            MASKED=bool(keys), BM=blocks.rows, BK=blocks.columns, num_warps=blocks.warps, num_stages=blocks.stages)
    if splits > 1:
        whole = s if s.is_contiguous() else torch.empty_like(s, memory_format=torch.contiguous_format)
        _sum(parts, whole)
        if whole is not s:
            s.copy_(whole)


def linear(x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float) -> Tensor:
    """The base's product is added to the adapter's, by cuBLAS as it writes."""
    return _outer(s, b, bias, scale).addmm_(x, w.t())


def _outer(s: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    s, b = _rows_whole(s), _rows_whole(b)
    num_rows, (num_outputs, rank) = s.shape[0], b.shape
    out = s.new_empty(num_rows, num_outputs)
    grid = (triton.cdiv(num_rows, 128), triton.cdiv(num_outputs, 128))
    with torch.cuda.device_of(s):
        kernels.outer_kernel[grid](s, b, s if bias is None else bias, out, num_rows, num_outputs, s.stride(0), b.stride(0), scale,
                                   RANK=rank, R=_padded(rank), HAS_BIAS=bias is not None, BM=128, BN=128, num_warps=8)
    return out


def up_grads(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Both from one reading of dY."""
    if b.shape[1] > MOST_RANK:
        return reference.up_grads(dy, b, s, scale)
    dy, b, s = _rows_whole(dy), _rows_whole(b), _rows_whole(s)
    (num_rows, num_outputs), rank = dy.shape, b.shape[1]
    padded = _padded(rank)
    blocks = blocks_of("up_grads", padded, False)
    column_blocks = triton.cdiv(num_outputs, blocks.columns)
    splits = _splits(num_rows, blocks.rows, column_blocks)
    ds_parts = dy.new_empty(column_blocks, num_rows, rank, dtype=torch.float32)
    db_parts = dy.new_empty(splits, num_outputs, rank, dtype=torch.float32)
    with torch.cuda.device_of(dy):
        kernels.up_grads_kernel[(column_blocks, splits)](
            dy, b, s, ds_parts, db_parts, num_rows, num_outputs, dy.stride(0), b.stride(0), s.stride(0), RANK=rank, R=padded,
            BM=blocks.rows, BN=blocks.columns, num_warps=blocks.warps, num_stages=blocks.stages)
    ds, db = dy.new_empty(num_rows, rank), dy.new_empty(num_outputs, rank)
    _sum(ds_parts, ds, db_parts, db, factor=scale)
    return ds, db


def down_grads(x: Tensor, ds: Tensor, a: Tensor, draw: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    """Both from one reading of x, and with each mask made once."""
    x, ds, a = _rows_whole(x), _rows_whole(ds), a.contiguous()
    total: Tensor | None = None
    da = torch.empty_like(a)
    for first, part, keys in _groups(a.shape[0], draw):
        dx = _down_grads(x, ds[:, part], a[part], da[part], first, keys, p)
        total = dx if total is None else total.add_(dx)
    assert total is not None
    return da, total


def _down_grads(x: Tensor, ds: Tensor, a: Tensor, da: Tensor, first_row: int, keys: list[int], p: float) -> Tensor:
    count = max(1, len(keys))
    rank, (num_rows, num_inputs) = a.shape[0] // count, x.shape
    padded = _padded(rank)
    if padded * count > 4 * MOST_RANK or padded > 2 * MOST_RANK:
        return _down_grads_by_products(x, ds, a, da, first_row, keys, p)
    blocks = blocks_of("down_grads", padded * count, bool(keys))
    column_blocks = triton.cdiv(num_inputs, blocks.columns)
    splits = _splits(num_rows, blocks.rows, column_blocks)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = x.new_empty(splits, *a.shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernels.down_grads_kernel[(column_blocks, splits)](
            x, ds, a, parts, dx, num_rows, num_inputs, x.stride(0), ds.stride(0), first_row, _signed(threshold(p)),
            1 / (1 - p) if keys else 1.0, *_halves(keys), LINEARS=count, RANK=rank, R=padded, MASKED=bool(keys),
            BM=blocks.rows, BN=blocks.columns, num_warps=blocks.warps, num_stages=blocks.stages)
    _sum(parts, da, factor=1 / (1 - p) if keys else 1.0)
    return dx


def _down_grads_by_products(x: Tensor, ds: Tensor, a: Tensor, da: Tensor, first_row: int, keys: list[int], p: float) -> Tensor:
    """Of a large rank, where products are no longer a matter of reading x."""
    if not keys:
        torch.mm(ds.t(), x, out=da)
        return ds @ a
    total: Tensor | None = None
    for key, down, weights, out in zip(keys, ds.chunk(len(keys), 1), a.chunk(len(keys)), da.chunk(len(keys)), strict=True):
        draw = torch.tensor([first_row, key])
        torch.mm(down.t(), dropped(x, draw, p), out=out)
        through = dropped(down @ weights, draw, p)
        total = through if total is None else total.add_(through)
    assert total is not None
    return total


def _sum(parts: Tensor, out: Tensor, parts2: Tensor | None = None, out2: Tensor | None = None, factor: float = 1.0) -> None:
    """Over the first dimension, times ``factor``; two such sums in one launch."""
    second = (parts, out, 0, 0) if parts2 is None or out2 is None else (parts2, out2, parts2.shape[0], out2.numel())
    grid = (triton.cdiv(out.numel(), SUM_BLOCK) + triton.cdiv(second[3], SUM_BLOCK),)
    with torch.cuda.device_of(out):
        kernels.sum_kernel[grid](parts, out, parts.shape[0], out.numel(), *second, factor, BLOCK=SUM_BLOCK, num_warps=4)


def _groups(num_ranks: int, draw: Tensor | None) -> Iterator[tuple[int, slice, list[int]]]:
    """First row, rows of A, and keys of as many linears as one launch takes."""
    if draw is None:
        yield 0, slice(0, num_ranks), []
        return
    first_row, *keys = draw.tolist()
    rank = num_ranks // len(keys)
    for begin in range(0, len(keys), kernels.MOST_LINEARS):
        some = keys[begin:begin + kernels.MOST_LINEARS]
        yield first_row, slice(begin * rank, (begin + len(some)) * rank), some


def _splits(num_rows: int, block_rows: int, blocks: int) -> int:
    return max(1, min(triton.cdiv(num_rows, block_rows), triton.cdiv(PROGRAMS, blocks)))


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _halves(keys: list[int]) -> list[int]:
    given = [*keys, *[0] * kernels.MOST_LINEARS][:kernels.MOST_LINEARS]
    return [_signed(half) for key in given for half in (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF)]


def _signed(half: int) -> int:
    return half - (1 << 32) if half >> 31 else half


def _rows_whole(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
