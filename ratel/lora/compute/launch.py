"""Launches of the adapter's kernels, and what shape of block each takes. Importing this module
needs Triton.

The functions are those of ``reference``, with the same arguments and results.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ratel.lora.compute import kernels, reference
from ratel.lora.compute.bound import ALIGNMENT, Bound, Layout, is_hopper, multiprocessors
from ratel.lora.compute.masks import Group, kernel_groups, kernel_threshold, kernel_words

MOST_RANK = 64
"""Above it a second reading of dY costs less than the parts of sums that one reading would leave to
be added."""
MOST_MASKED_RANK = 128
"""Above it a program's block of sums is larger than its registers: the masked input is written."""
PROGRAMS = {"down": 264, "up_grads": 264, "a_grads": 396}
"""Twice or three times the multiprocessors of an H200: sums are split among so many programs or a
few more."""
SUM_PARTS, SUM_BLOCK = 16, 256
INNER = 64
"""A product's blocks have so many of what is summed over."""
NO_WORDS = kernel_words(0, [], kernels.MOST_LINEARS)
_of_sizes = functools.lru_cache(maxsize=4096)
"""What is bound to sizes is made once: a run has few micro-batches of different sizes."""


class Blocks(NamedTuple):
    """What one program takes: rows and columns of what it reads at once, warps, loads in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


def blocks_of(kernel: str, rank: int) -> Blocks:
    """``rank``: padded."""
    if kernel == "product":
        return Blocks(128, 256, 8, 3)
    if kernel == "down":
        return Blocks(32, 128, 4, 4) if rank <= 32 else Blocks(64, 64, 4, 3)
    if kernel == "up_grads":
        return Blocks(64, 256, 4, 3) if rank <= 32 else Blocks(64, 128, 8, 3)
    return Blocks(64, 64, 4, 4) if rank <= 32 else Blocks(64, 64, 8, 3)


def can(x: Tensor) -> bool:
    """Whether the kernels take inputs like this one: others are computed by the reference."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.numel() > 0


# --- dropout ----------------------------------------------------------------------------------------------------


def dropped(x: Tensor, draw: Tensor | None, p: float, index: int = 0) -> Tensor:
    if draw is None:
        return x
    x, (first_row, *keys) = _rows_whole(x), draw.tolist()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _dropped_of(*x.shape, x.stride(0), x.dtype, p)((x, out), kernel_words(first_row, [keys[index]], 1))
    return out


@_of_sizes
def _dropped_of(num_rows: int, num_columns: int, stride: int, dtype: torch.dtype, p: float) -> Bound:
    return Bound(kernels.dropped_kernel, (triton.cdiv(num_rows, 16), triton.cdiv(num_columns, 256)),
                 (num_rows, num_columns, stride, kernel_threshold(p), 1 / (1 - p)), constants=dict(BM=16, BN=256), num_warps=4)


# --- S = X A' ---------------------------------------------------------------------------------------------------


def down(x: Tensor, a: Tensor, draw: Tensor | None, p: float) -> Tensor:
    """x from memory once, whatever the number of linears."""
    if draw is None:
        return x @ a.t()
    groups, num_ranks = _groups_of(draw), a.shape[0]
    count = groups[-1].begin + groups[-1].count
    if num_ranks // count > MOST_MASKED_RANK:
        return torch.cat([dropped(x, draw, p, index) @ one.t() for index, one in enumerate(a.chunk(count))], 1)
    x, a = _rows_whole(x), a.contiguous()
    s = x.new_empty((x.shape[0], num_ranks))
    if len(groups) == 1:
        _down(x, a, s, count, groups[0].words, p)
    else:
        for group in groups:
            part = group.part(num_ranks // count)
            _down(x, a[part], s[:, part], group.count, group.words, p)
    return s


def _down(x: Tensor, a: Tensor, s: Tensor, count: int, words: tuple[int, ...], p: float) -> None:
    splits, bound, of_parts = _down_of(*x.shape, x.stride(0), a.shape[0], count, s.stride(0), x.dtype, a.dtype, p)
    if splits == 1:
        bound((x, a, s), words)
        return
    parts = x.new_empty((splits, *s.shape), dtype=torch.float32)
    bound((x, a, parts), words)
    whole = s if s.is_contiguous() else s.new_empty(s.shape)
    of_parts((parts, whole, parts, whole))
    if whole is not s:
        s.copy_(whole)


@_of_sizes
def _down_of(num_rows: int, num_inputs: int, stride: int, num_ranks: int, count: int, out_stride: int, dtype: torch.dtype,
             a_dtype: torch.dtype, p: float) -> tuple[int, Bound, Bound]:
    rank = num_ranks // count
    blocks = blocks_of("down", _padded(rank))
    row_blocks = triton.cdiv(num_rows, blocks.rows) * count
    splits = max(1, min(8, PROGRAMS["down"] // row_blocks, num_inputs // (2 * blocks.columns)))
    strides = (out_stride, 0) if splits == 1 else (num_ranks, num_rows * num_ranks)
    bound = Bound(kernels.down_kernel, (row_blocks, splits),
                  (num_rows, num_inputs, stride, *strides, kernel_threshold(p), 1 / (1 - p)),
                  constants=dict(LINEARS=count, RANK=rank, R=_padded(rank), BM=blocks.rows, BK=blocks.columns),
                  num_warps=blocks.warps, num_stages=blocks.stages)
    return splits, bound, _sum(splits, num_rows * num_ranks, 0, 0, 1.0, dtype)


# --- dS and dB --------------------------------------------------------------------------------------------------


def up_grads(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Both from one reading of dY."""
    if b.shape[1] > MOST_RANK:
        return reference.up_grads(dy, b, s, scale)
    dy, b, s = _rows_whole(dy), _rows_whole(b), _rows_whole(s)
    (num_rows, num_outputs), rank = dy.shape, b.shape[1]
    column_blocks, splits, bound, of_parts = _up_grads_of(num_rows, num_outputs, rank, dy.stride(0), b.stride(0), s.stride(0),
                                                          dy.dtype, b.dtype, s.dtype, scale)
    ds_parts = dy.new_empty((column_blocks, num_rows, rank), dtype=torch.float32)
    db_parts = dy.new_empty((splits, num_outputs, rank), dtype=torch.float32)
    bound((dy, b, s, ds_parts, db_parts))
    ds = dy.new_empty((num_rows, rank))
    db = dy.new_empty((num_outputs, rank), dtype=b.dtype)
    of_parts((ds_parts, ds, db_parts, db))
    return ds, db


@_of_sizes
def _up_grads_of(num_rows: int, num_outputs: int, rank: int, dy_stride: int, b_stride: int, s_stride: int, dtype: torch.dtype,
                 b_dtype: torch.dtype, s_dtype: torch.dtype, scale: float) -> tuple[int, int, Bound, Bound]:
    blocks = blocks_of("up_grads", _padded(rank))
    column_blocks = triton.cdiv(num_outputs, blocks.columns)
    splits = _splits("up_grads", num_rows, blocks.rows, column_blocks)
    bound = Bound(kernels.up_grads_kernel, (column_blocks, splits), (num_rows, num_outputs, dy_stride, b_stride, s_stride),
                  constants=dict(RANK=rank, R=_padded(rank), BM=blocks.rows, BN=blocks.columns), num_warps=blocks.warps,
                  num_stages=blocks.stages)
    return column_blocks, splits, bound, _sum(column_blocks, num_rows * rank, splits, num_outputs * rank, scale, dtype)


# --- dA ---------------------------------------------------------------------------------------------------------


def a_grads(x: Tensor, ds: Tensor, a: Tensor, draw: Tensor | None, p: float, dtype: torch.dtype | None = None) -> Tensor:
    """x from memory once, whatever the number of linears."""
    dtype = dtype or a.dtype
    if draw is None:
        return (ds.t() @ x).to(dtype)
    groups, num_ranks = _groups_of(draw), a.shape[0]
    count = groups[-1].begin + groups[-1].count
    if num_ranks // count > MOST_MASKED_RANK:
        return torch.cat([one.t() @ dropped(x, draw, p, index) for index, one in enumerate(ds.chunk(count, 1))]).to(dtype)
    x, ds = _rows_whole(x), _rows_whole(ds)
    da = x.new_empty(a.shape, dtype=dtype)
    if len(groups) == 1:
        _a_grads(x, ds, da, count, groups[0].words, p)
    else:
        for group in groups:
            part = group.part(num_ranks // count)
            _a_grads(x, ds[:, part], da[part], group.count, group.words, p)
    return da


def _a_grads(x: Tensor, ds: Tensor, da: Tensor, count: int, words: tuple[int, ...], p: float) -> None:
    splits, bound, of_parts = _a_grads_of(*x.shape, x.stride(0), da.shape[0], count, ds.stride(0), x.dtype, ds.dtype, da.dtype, p)
    parts = x.new_empty((splits, *da.shape), dtype=torch.float32)
    bound((x, ds, parts), words)
    of_parts((parts, da, parts, da))


@_of_sizes
def _a_grads_of(num_rows: int, num_inputs: int, stride: int, num_ranks: int, count: int, ds_stride: int, dtype: torch.dtype,
                ds_dtype: torch.dtype, da_dtype: torch.dtype, p: float) -> tuple[int, Bound, Bound]:
    rank = num_ranks // count
    blocks = blocks_of("a_grads", _padded(rank))
    column_blocks = triton.cdiv(num_inputs, blocks.columns) * count
    splits = _splits("a_grads", num_rows, blocks.rows, column_blocks)
    bound = Bound(kernels.a_grads_kernel, (column_blocks, splits), (num_rows, num_inputs, stride, ds_stride, kernel_threshold(p)),
                  constants=dict(LINEARS=count, RANK=rank, R=_padded(rank), BM=blocks.rows, BN=blocks.columns),
                  num_warps=blocks.warps, num_stages=blocks.stages)
    return splits, bound, _sum(splits, num_ranks * num_inputs, 0, 0, 1 / (1 - p), dtype)


# --- Y and dX ---------------------------------------------------------------------------------------------------


def linear(x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float) -> Tensor:
    """By one product, whose accumulators begin with s S B' + bias; where that cannot be, cuBLAS
    adds the base's product to a matrix of that."""
    return _products([_rows_whole(x), w.t()], _rows_whole(s), b.t(), bias, scale, None, 0.0)


def input_grad(dys: list[Tensor], ws: list[Tensor], ds: Tensor, a: Tensor, draw: Tensor | None, p: float) -> Tensor:
    """All of up to three linears in one product, whose accumulators begin with the adapters'
    part."""
    count = 1 if draw is None else draw.shape[0] - 1
    if count > kernels.MOST_LINEARS or len(dys) > kernels.MOST_LINEARS:
        return reference.input_grad(dys, ws, ds, a, draw, p)
    pairs = [tensor for dy, w in zip(dys, ws, strict=True) for tensor in (_rows_whole(dy), w)]
    return _products(pairs, _rows_whole(ds), a, None, 1.0 if draw is None else 1 / (1 - p), draw, p)


def _products(pairs: list[Tensor], left: Tensor, right: Tensor, bias: Tensor | None, factor: float, draw: Tensor | None,
              p: float) -> Tensor:
    """The sum of x w, for pairs of x and w, and factor times left right, each linear's part masked
    by its key."""
    out = left.new_empty((left.shape[0], right.shape[1]))
    count, words = (0, NO_WORDS) if draw is None else (draw.shape[0] - 1, _groups_of(draw)[0].words)
    beginning = out if bias is None else bias
    through = Through(*left.shape, *right.shape, left.stride(0), *right.stride(), left.dtype, right.dtype,
                      None if bias is None else bias.dtype, count, factor, p)
    if count <= 1:
        bound = _product_of(through, left.get_device(), *[(*t.shape, *t.stride(), t.dtype) for t in pairs])
        if bound is not None and not any([t.data_ptr() % ALIGNMENT for t in pairs]):
            bound((*pairs, *[None] * (2 * kernels.MOST_LINEARS - len(pairs)), out, left, right, beginning), words)
            return out
    if through.rank <= MOST_MASKED_RANK:
        _through_of(through)((left, right, beginning, out), words)
    else:
        _through_of_large_rank(out, left, right.to(left.dtype), bias, factor, draw, p)
    for x, w in zip(pairs[::2], pairs[1::2], strict=True):
        out.addmm_(x, w)
    return out


class Through(NamedTuple):
    """What the adapters add: sizes and types of left [M, g r] and right [g r, j], and the rest that
    a kernel is bound to."""

    num_rows: int
    num_left: int
    num_ranks: int
    num_columns: int
    left_stride: int
    rank_stride: int
    column_stride: int
    dtype: torch.dtype
    right_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    masks: int
    factor: float
    p: float

    @property
    def rank(self) -> int:
        return self.num_ranks // max(1, self.masks)

    @property
    def numbers(self) -> tuple[float, ...]:
        return self.left_stride, self.rank_stride, self.column_stride, kernel_threshold(self.p), float(self.factor)

    @property
    def constants(self) -> dict[str, int]:
        return dict(LINEARS=max(1, self.masks), RANK=self.rank, MASKED=self.masks > 0, HAS_BIAS=self.bias_dtype is not None)


@_of_sizes
def _through_of(through: Through) -> Bound:
    grid = (triton.cdiv(through.num_rows, 64), triton.cdiv(through.num_columns, 128))
    return Bound(kernels.through_kernel, grid, (through.num_rows, through.num_columns, *through.numbers),
                 constants={**through.constants, "BM": 64, "BN": 128}, num_warps=4 if through.masks <= 1 else 8)


@_of_sizes
def _product_of(through: Through, device: int, *places: tuple[Any, ...]) -> Bound | None:
    """``places``: shape, strides and type of each x and w. None where tensor descriptors cannot tell where
    those are, or the GPU has nothing that reads descriptors (of Hopper's kind: elsewhere cuBLAS is
    the faster). Allocations begin at multiples of 512 bytes, so that the result needs no look."""
    blocks, ws = blocks_of("product", 0), places[1::2]
    is_transposed = ws[0][3] != 1
    if through.rank > MOST_MASKED_RANK or not is_hopper(device) or len({w[3] != 1 for w in ws}) > 1 \
            or any(place[4] != through.dtype for place in places):
        return None
    layouts: list[Layout | None] = []
    for x, w in zip(places[::2], ws, strict=True):
        layouts.append((x[:2], x[2:4], (blocks.rows, INNER)))
        layouts.append((w[1::-1], w[3:1:-1], (blocks.columns, INNER)) if is_transposed else
                       (w[:2], w[2:4], (INNER, blocks.columns)))
    layouts += [None] * (2 * kernels.MOST_LINEARS - len(layouts))
    layouts.append(((through.num_rows, through.num_columns), (through.num_columns, 1), (blocks.rows, blocks.columns)))
    if any(layout[1][1] != 1 or layout[1][0] * through.dtype.itemsize % ALIGNMENT for layout in layouts if layout is not None):
        return None
    inners = [*[x[1] for x in places[::2]], *[0] * kernels.MOST_LINEARS][:kernels.MOST_LINEARS]
    tiles = triton.cdiv(through.num_rows, blocks.rows) * triton.cdiv(through.num_columns, blocks.columns)
    programs = multiprocessors(device)
    constants = dict(PRODUCTS=len(ws), TRANSPOSED=is_transposed, **through.constants, BM=blocks.rows, BN=blocks.columns, BK=INNER,
                     GROUP=8, PROGRAMS=programs)
    return Bound(kernels.product_kernel, (min(tiles, programs),), (through.num_rows, through.num_columns, *inners, *through.numbers),
                 tuple(layouts), constants=constants, num_warps=blocks.warps, num_stages=blocks.stages)


def _through_of_large_rank(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, factor: float, draw: Tensor | None,
                           p: float) -> None:
    if draw is None:
        torch.addmm(out, left, right, beta=0, alpha=factor, out=out)
    else:
        count = len(draw) - 1
        for index, (one, other) in enumerate(zip(left.chunk(count, 1), right.chunk(count), strict=True)):
            part = dropped(one @ other, draw, p, index)
            out.copy_(part) if index == 0 else out.add_(part)
    if bias is not None:
        out.add_(bias)


# --- what they share --------------------------------------------------------------------------------------------


@_of_sizes
def _sum(count: int, size: int, count2: int, size2: int, factor: float, rounded: torch.dtype) -> Bound:
    """Sums of parts over their first dimension, times ``factor``, rounded to a type and written in
    another; two in one launch."""
    constants = dict(ROUNDED=triton.language.bfloat16 if rounded == torch.bfloat16 else triton.language.float16, PARTS=SUM_PARTS,
                     BLOCK=SUM_BLOCK)
    return Bound(kernels.sum_kernel, (triton.cdiv(size, SUM_BLOCK) + triton.cdiv(size2, SUM_BLOCK),),
                 (count, size, count2, size2, float(factor)), constants=constants, num_warps=4)


def _groups_of(draw: Tensor) -> tuple[Group, ...]:
    return kernel_groups(tuple(draw.tolist()), kernels.MOST_LINEARS)


def _splits(kernel: str, num_rows: int, block_rows: int, blocks: int) -> int:
    return max(1, min(triton.cdiv(num_rows, block_rows), triton.cdiv(PROGRAMS[kernel], blocks)))


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _rows_whole(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
