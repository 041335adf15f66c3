"""Launches of the adapter's kernels, and what shape of block each takes. Importing this module
needs Triton.

The functions are those of ``reference``, with the same arguments and results.
"""

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ratel.lora.compute import kernels, reference
from ratel.lora.compute.masks import threshold

MOST_RANK = 64
"""Above it a second reading of dY costs less than the parts of sums that one reading would leave to
be added."""
MOST_MASKED_RANK = 128
"""Above it a program's block of sums is larger than its registers: the masked input is written."""
PROGRAMS = {"down": 264, "up_grads": 264, "a_grads": 396}
"""Twice or three times the multiprocessors of an H200: sums are split among so many programs or a
few more."""
SUM_PARTS, SUM_BLOCK = 16, 256
ALIGNMENT = 16
"""Bytes, of what tensor descriptors read: where a tensor begins, and its rows."""


class Blocks(NamedTuple):
    """What one program takes: rows and columns of what it reads at once, warps, loads in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


def blocks_of(kernel: str, rank: int) -> Blocks:
    """``rank``: padded. ``product``'s inner size is 64."""
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


def dropped(x: Tensor, draw: Tensor | None, p: float, index: int = 0) -> Tensor:
    if draw is None:
        return x
    x, out = _rows_whole(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first_row, *keys = draw.tolist()
    grid = (triton.cdiv(x.shape[0], 16), triton.cdiv(x.shape[1], 256))
    with _device_of(x):
        kernels.dropped_kernel[grid](x, out, *x.shape, x.stride(0), first_row, _signed(threshold(p)), 1 / (1 - p),
                                     *_halves(keys[index:])[:2], BM=16, BN=256, num_warps=4)
    return out


def down(x: Tensor, a: Tensor, draw: Tensor | None, p: float) -> Tensor:
    """x from memory once, whatever the number of linears."""
    if draw is None:
        return x @ a.t()
    count = len(draw) - 1
    if a.shape[0] // count > MOST_MASKED_RANK:
        return torch.cat([dropped(x, draw, p, index) @ one.t() for index, one in enumerate(a.chunk(count))], 1)
    x, a = _rows_whole(x), a.contiguous()
    s = x.new_empty(x.shape[0], a.shape[0])
    for first_row, keys, part in _groups(a.shape[0], draw):
        _down(x, a[part], s[:, part], first_row, keys, p)
    return s


def _down(x: Tensor, a: Tensor, s: Tensor, first_row: int, keys: list[int], p: float) -> None:
    rank, (num_rows, num_inputs) = a.shape[0] // len(keys), x.shape
    blocks = blocks_of("down", _padded(rank))
    row_blocks = triton.cdiv(num_rows, blocks.rows) * len(keys)
    splits = max(1, min(8, PROGRAMS["down"] // row_blocks, num_inputs // (2 * blocks.columns)))
    parts = s if splits == 1 else x.new_empty(splits, num_rows, a.shape[0], dtype=torch.float32)
    with _device_of(x):
        kernels.down_kernel[(row_blocks, splits)](
            x, a, parts, num_rows, num_inputs, x.stride(0), parts.stride(-2), 0 if splits == 1 else parts.stride(0), first_row,
            _signed(threshold(p)), 1 / (1 - p), *_halves(keys), LINEARS=len(keys), RANK=rank, R=_padded(rank),
            BM=blocks.rows, BK=blocks.columns, num_warps=blocks.warps, num_stages=blocks.stages)
    if splits > 1:
        whole = s if s.is_contiguous() else torch.empty_like(s, memory_format=torch.contiguous_format)
        _sum(parts, whole)
        if whole is not s:
            s.copy_(whole)


def linear(x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float) -> Tensor:
    """By one product, whose accumulators begin with s S B' + bias; where that cannot be, cuBLAS
    adds the base's product to a matrix of that."""
    return _products([x], [w.t()], _rows_whole(s), b.t(), bias, scale, 0, [])


def up_grads(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Both from one reading of dY."""
    if b.shape[1] > MOST_RANK:
        return reference.up_grads(dy, b, s, scale)
    dy, b, s = _rows_whole(dy), _rows_whole(b), _rows_whole(s)
    (num_rows, num_outputs), rank = dy.shape, b.shape[1]
    blocks = blocks_of("up_grads", _padded(rank))
    column_blocks = triton.cdiv(num_outputs, blocks.columns)
    splits = _splits("up_grads", num_rows, blocks.rows, column_blocks)
    ds_parts = dy.new_empty(column_blocks, num_rows, rank, dtype=torch.float32)
    db_parts = dy.new_empty(splits, num_outputs, rank, dtype=torch.float32)
    with _device_of(dy):
        kernels.up_grads_kernel[(column_blocks, splits)](
            dy, b, s, ds_parts, db_parts, num_rows, num_outputs, dy.stride(0), b.stride(0), s.stride(0), RANK=rank, R=_padded(rank),
            BM=blocks.rows, BN=blocks.columns, num_warps=blocks.warps, num_stages=blocks.stages)
    ds, db = dy.new_empty(num_rows, rank), dy.new_empty(num_outputs, rank)
    _sum(ds_parts, ds, db_parts, db, factor=scale)
    return ds, db


def a_grads(x: Tensor, ds: Tensor, a: Tensor, draw: Tensor | None, p: float) -> Tensor:
    """x from memory once, whatever the number of linears."""
    if draw is None:
        return ds.t() @ x
    count = len(draw) - 1
    if a.shape[0] // count > MOST_MASKED_RANK:
        return torch.cat([one.t() @ dropped(x, draw, p, index) for index, one in enumerate(ds.chunk(count, 1))])
    x, ds = _rows_whole(x), _rows_whole(ds)
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    for first_row, keys, part in _groups(a.shape[0], draw):
        _a_grads(x, ds[:, part], da[part], first_row, keys, p)
    return da


def _a_grads(x: Tensor, ds: Tensor, da: Tensor, first_row: int, keys: list[int], p: float) -> None:
    rank, (num_rows, num_inputs) = da.shape[0] // len(keys), x.shape
    blocks = blocks_of("a_grads", _padded(rank))
    column_blocks = triton.cdiv(num_inputs, blocks.columns) * len(keys)
    splits = _splits("a_grads", num_rows, blocks.rows, column_blocks)
    parts = x.new_empty(splits, *da.shape, dtype=torch.float32)
    with _device_of(x):
        kernels.a_grads_kernel[(column_blocks, splits)](
            x, ds, parts, num_rows, num_inputs, x.stride(0), ds.stride(0), first_row, _signed(threshold(p)), *_halves(keys),
            LINEARS=len(keys), RANK=rank, R=_padded(rank), BM=blocks.rows, BN=blocks.columns, num_warps=blocks.warps,
            num_stages=blocks.stages)
    _sum(parts, da, factor=1 / (1 - p))


def input_grad(dys: list[Tensor], ws: list[Tensor], ds: Tensor, a: Tensor, draw: Tensor | None, p: float) -> Tensor:
    """All of up to three linears in one product, whose accumulators begin with the adapters'
    part."""
    count = 1 if draw is None else len(draw) - 1
    if count > kernels.MOST_LINEARS or len(dys) > kernels.MOST_LINEARS:
        return reference.input_grad(dys, ws, ds, a, draw, p)
    first_row, *keys = [0] if draw is None else draw.tolist()
    return _products(dys, ws, _rows_whole(ds), a, None, 1.0 if draw is None else 1 / (1 - p), first_row, keys, p)


def _products(xs: list[Tensor], ws: list[Tensor], left: Tensor, right: Tensor, bias: Tensor | None, factor: float, first_row: int,
              keys: list[int], p: float = 0.0) -> Tensor:
    """The sum of x w and factor times left right, each linear's part masked by its key."""
    xs = [_rows_whole(x) for x in xs]
    count, num_rows, num_columns = max(1, len(keys)), left.shape[0], right.shape[1]
    rank = right.shape[0] // count
    out = left.new_empty(num_rows, num_columns)
    through = dict(LINEARS=count, RANK=rank, MASKED=bool(keys), HAS_BIAS=bias is not None)
    strides = left.stride(0), *right.stride()
    changing = first_row, _signed(threshold(p)), factor, *_halves(keys)
    with _device_of(left):
        if count == 1 and rank <= MOST_MASKED_RANK and _described(xs, ws, out):
            _product(xs, ws, out, left, right, bias, strides, changing, through)
            return out
        if rank <= MOST_MASKED_RANK:
            grid = (triton.cdiv(num_rows, 64), triton.cdiv(num_columns, 128))
            kernels.through_kernel[grid](left, right, out if bias is None else bias, out, num_rows, num_columns, *strides, *changing,
                                         **through, BM=64, BN=128, num_warps=4 if count == 1 else 8)
        else:
            _through_of_large_rank(out, left, right, bias, factor, first_row, keys, p)
    for x, w in zip(xs, ws, strict=True):
        out.addmm_(x, w)
    return out


def _through_of_large_rank(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, factor: float, first_row: int,
                           keys: list[int], p: float) -> None:
    if not keys:
        torch.addmm(out, left, right, beta=0, alpha=factor, out=out)
    for index, (one, other) in enumerate(zip(left.chunk(len(keys), 1), right.chunk(len(keys)), strict=True)) if keys else ():
        part = dropped(one @ other, torch.tensor([first_row, keys[index]]), p)
        out.copy_(part) if index == 0 else out.add_(part)
    if bias is not None:
        out.add_(bias)


def _product(xs: list[Tensor], ws: list[Tensor], out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None,
             strides: tuple[int, ...], changing: tuple[float, ...], through: dict[str, int]) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    blocks, inner = blocks_of("product", 0), 64
    is_transposed = ws[0].stride(1) != 1
    x_descriptors = [TensorDescriptor.from_tensor(x, [blocks.rows, inner]) for x in xs]
    w_descriptors = [TensorDescriptor.from_tensor(w.t(), [blocks.columns, inner]) if is_transposed else
                     TensorDescriptor.from_tensor(w, [inner, blocks.columns]) for w in ws]
    given = [descriptor for pair in zip(x_descriptors, w_descriptors, strict=True) for descriptor in pair]
    given += given[:2] * (kernels.MOST_LINEARS - len(xs))
    inners = [*(x.shape[1] for x in xs), *[0] * kernels.MOST_LINEARS][:kernels.MOST_LINEARS]
    tiles = triton.cdiv(out.shape[0], blocks.rows) * triton.cdiv(out.shape[1], blocks.columns)
    programs = min(tiles, _multiprocessors(out.device.index or 0))
    kernels.product_kernel[(programs,)](
        *given, TensorDescriptor.from_tensor(out, [blocks.rows, blocks.columns]), left, right, out if bias is None else bias,
        *out.shape, *inners, *strides, *changing, PRODUCTS=len(xs), TRANSPOSED=is_transposed, **through, BM=blocks.rows,
        BN=blocks.columns, BK=inner, GROUP=8, PROGRAMS=_multiprocessors(out.device.index or 0), num_warps=blocks.warps,
        num_stages=blocks.stages)


def _described(xs: list[Tensor], ws: list[Tensor], out: Tensor) -> bool:
    """Whether tensor descriptors can tell where all of these are, on a GPU that has what reads them
    (of Hopper's kind: elsewhere cuBLAS is the faster)."""
    if not _is_hopper(out.device.index or 0) or len({w.stride(1) != 1 for w in ws}) > 1:
        return False
    rows = [*xs, out, *(w if w.stride(1) == 1 else w.t() for w in ws)]
    return all(t.stride(1) == 1 and t.stride(0) * t.element_size() % ALIGNMENT == 0 and t.data_ptr() % ALIGNMENT == 0 for t in rows)


@functools.cache
def _is_hopper(index: int) -> bool:
    try:
        import triton.tools.tensor_descriptor  # noqa: F401  (older versions have none)
    except ImportError:
        return False
    return torch.cuda.get_device_capability(index)[0] == 9


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _sum(parts: Tensor, out: Tensor, parts2: Tensor | None = None, out2: Tensor | None = None, factor: float = 1.0) -> None:
    """Over the first dimension, times ``factor``; two such sums in one launch."""
    second = (parts, out, 0, 0) if parts2 is None or out2 is None else (parts2, out2, parts2.shape[0], out2.numel())
    grid = (triton.cdiv(out.numel(), SUM_BLOCK) + triton.cdiv(second[3], SUM_BLOCK),)
    with _device_of(out):
        kernels.sum_kernel[grid](parts, out, parts.shape[0], out.numel(), *second, factor, PARTS=SUM_PARTS, BLOCK=SUM_BLOCK,
                                 num_warps=4)


def _groups(num_ranks: int, draw: Tensor) -> Iterator[tuple[int, list[int], slice]]:
    """First row, keys and rows of A of as many linears as one launch takes."""
    first_row, *keys = draw.tolist()
    rank = num_ranks // len(keys)
    for begin in range(0, len(keys), kernels.MOST_LINEARS):
        some = keys[begin:begin + kernels.MOST_LINEARS]
        yield first_row, some, slice(begin * rank, (begin + len(some)) * rank)


def _splits(kernel: str, num_rows: int, block_rows: int, blocks: int) -> int:
    return max(1, min(triton.cdiv(num_rows, block_rows), triton.cdiv(PROGRAMS[kernel], blocks)))


def _device_of(x: Tensor) -> Any:
    """Launches go to the current device, which it nearly always is."""
    return nullcontext() if not x.is_cuda or x.device.index == torch.cuda.current_device() else torch.cuda.device_of(x)


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _halves(keys: list[int]) -> list[int]:
    given = [*keys, *[0] * kernels.MOST_LINEARS][:kernels.MOST_LINEARS]
    return [_signed(half) for key in given for half in (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF)]


def _signed(half: int) -> int:
    return half - (1 << 32) if half >> 31 else half


def _rows_whole(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
