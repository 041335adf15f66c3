"""The adapter's Triton kernels. Importing this module needs Triton.

Letters as in ``reference``. All read row-major tensors whose last stride is one, accumulate in fp32
and index with 64 bits. Sums over rows are split among programs, and their parts are added by a
second kernel in a fixed order: no atomics, the same bits every time. A rank is padded with zeros to
R, a power of two that the matrix units take. Keys come as two halves of 32 bits, of up to three
linears.
"""

import triton
import triton.language as tl

from ratel.lora.compute import masks

GOLDEN, MIX1, MIX2 = (tl.constexpr(value) for value in (masks.GOLDEN, masks.MIX1, masks.MIX2))
COLUMN0, COLUMN1, COLUMN2 = (tl.constexpr(value) for value in (masks.COLUMN0, masks.COLUMN1, masks.COLUMN2))
MOST_LINEARS = 3
KEYS = ["key0_low", "key0_high", "key1_low", "key1_high", "key2_low", "key2_high"]
CHANGING = ["num_rows", "first_row", "threshold", "factor", *KEYS]
"""Arguments that change from call to call: a kernel made for their values would be compiled again
and again."""


@triton.jit
def _row_words(rows, key_low, key_high):
    key = (tl.cast(key_high, tl.uint32, bitcast=True).to(tl.uint64) << 32) | tl.cast(key_low, tl.uint32, bitcast=True).to(tl.uint64)
    z = rows.to(tl.uint64) * GOLDEN + key
    z = (z ^ (z >> 30)) * MIX1
    z = (z ^ (z >> 27)) * MIX2
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def _kept(rows, columns, key_low, key_high, threshold):
    """[rows, columns], as masks.keep_mask has it; ``threshold`` as a signed number of 32 bits."""
    low, high = _row_words(rows, key_low, key_high)
    words = columns.to(tl.uint32) * COLUMN0
    words = words ^ (words >> 16)
    x = low[:, None] ^ words[None, :]
    x = (x ^ (x >> 16)) * COLUMN1
    x = (x ^ (x >> 15) ^ high[:, None]) * COLUMN2
    return x >= tl.cast(threshold, tl.uint32, bitcast=True)


@triton.jit
def _load(base, rows, num_rows, columns, num_columns, stride):
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(base + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, values, rows, num_rows, columns, num_columns, stride):
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(base + rows[:, None].to(tl.int64) * stride + columns[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=CHANGING)
def dropped_kernel(x, out, num_rows, num_columns, x_stride, first_row, threshold, factor, key0_low, key0_high,
                   BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    values = _load(x, rows, num_rows, columns, num_columns, x_stride)
    kept = _kept(first_row + rows, columns, key0_low, key0_high, threshold)
    quotient = tl.div_rn(values.to(tl.float32), tl.full([BM, BN], factor, tl.float32))
    _store(out, tl.where(kept, quotient, 0.0), rows, num_rows, columns, num_columns, num_columns)


@triton.jit(do_not_specialize=CHANGING)
def down_kernel(x, a, out, num_rows, num_inputs, x_stride, out_stride, part_stride, first_row, threshold, factor,
                key0_low, key0_high, key1_low, key1_high, key2_low, key2_high,
                LINEARS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr,
                BM: tl.constexpr, BK: tl.constexpr):
    """S: programs of the same rows and another linear run beside each other, so that x comes from
    memory once."""
    linear = tl.program_id(0) % LINEARS
    rows = (tl.program_id(0) // LINEARS).to(tl.int64) * BM + tl.arange(0, BM)
    ranks = tl.arange(0, R)
    key_low = tl.where(linear == 0, key0_low, tl.where(linear == 1, key1_low, key2_low))
    key_high = tl.where(linear == 0, key0_high, tl.where(linear == 1, key1_high, key2_high))
    steps = tl.cdiv(num_inputs, BK * tl.num_programs(1))
    begin = tl.program_id(1) * steps * BK
    a += linear.to(tl.int64) * RANK * num_inputs
    sums = tl.zeros([BM, R], tl.float32)
    for step in range(steps):
        columns = begin + step * BK + tl.arange(0, BK)
        values = _load(x, rows, num_rows, columns, num_inputs, x_stride)
        if MASKED:
            values = tl.where(_kept(first_row + rows, columns, key_low, key_high, threshold), values, 0.0)
        sums = tl.dot(values, tl.trans(_load(a, ranks, RANK, columns, num_inputs, num_inputs)), sums)
    out += tl.program_id(1).to(tl.int64) * part_stride + linear * RANK
    _store(out, sums * factor, rows, num_rows, ranks, RANK, out_stride)


@triton.jit(do_not_specialize=CHANGING)
def up_grads_kernel(dy, b, s, ds_parts, db_parts, num_rows, num_outputs, dy_stride, b_stride, s_stride,
                    RANK: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """One block of columns and some blocks of rows of dY: that block's part of dS, those rows' part
    of dB'."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    steps = tl.cdiv(num_rows, BM * tl.num_programs(1))
    begin = tl.program_id(1).to(tl.int64) * steps * BM
    weights = _load(b, columns, num_outputs, ranks, RANK, b_stride)
    ds_parts += tl.program_id(0).to(tl.int64) * num_rows * RANK
    db_parts += tl.program_id(1).to(tl.int64) * num_outputs * RANK
    sums = tl.zeros([R, BN], tl.float32)
    for step in range(steps):
        rows = begin + step * BM + tl.arange(0, BM)
        values = _load(dy, rows, num_rows, columns, num_outputs, dy_stride)
        _store(ds_parts, tl.dot(values, weights), rows, num_rows, ranks, RANK, RANK)
        sums = tl.dot(tl.trans(_load(s, rows, num_rows, ranks, RANK, s_stride)), values, sums)
    _store(db_parts, tl.trans(sums), columns, num_outputs, ranks, RANK, RANK)


@triton.jit
def _one_linear(values, ds, a, sums, through, rows, num_rows, first_row, columns, num_inputs, ds_stride, key_low, key_high, threshold,
                linear: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr):
    ranks = tl.arange(0, R)
    down = _load(ds + linear * RANK, rows, num_rows, ranks, RANK, ds_stride)
    weights = _load(a + linear * RANK * num_inputs, ranks, RANK, columns, num_inputs, num_inputs)
    back = tl.dot(down, weights)
    if MASKED:
        kept = _kept(first_row + rows, columns, key_low, key_high, threshold)
        values = tl.where(kept, values, 0.0)
        back = tl.where(kept, back, 0.0)
    return tl.dot(tl.trans(down), values, sums), through + back


@triton.jit(do_not_specialize=CHANGING)
def down_grads_kernel(x, ds, a, da_parts, dx, num_rows, num_inputs, x_stride, ds_stride, first_row, threshold, factor,
                      key0_low, key0_high, key1_low, key1_high, key2_low, key2_high,
                      LINEARS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr):
    """One block of columns and some blocks of rows of x: those rows' part of dA, and dX through the
    adapters."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    steps = tl.cdiv(num_rows, BM * tl.num_programs(1))
    begin = tl.program_id(1).to(tl.int64) * steps * BM
    sums0 = tl.zeros([R, BN], tl.float32)
    sums1 = tl.zeros([R, BN], tl.float32)
    sums2 = tl.zeros([R, BN], tl.float32)
    for step in range(steps):
        rows = begin + step * BM + tl.arange(0, BM)
        values = _load(x, rows, num_rows, columns, num_inputs, x_stride)
        through = tl.zeros([BM, BN], tl.float32)
        sums0, through = _one_linear(values, ds, a, sums0, through, rows, num_rows, first_row, columns, num_inputs, ds_stride,
                                     key0_low, key0_high, threshold, 0, RANK, R, MASKED)
        if LINEARS > 1:
            sums1, through = _one_linear(values, ds, a, sums1, through, rows, num_rows, first_row, columns, num_inputs, ds_stride,
                                         key1_low, key1_high, threshold, 1, RANK, R, MASKED)
        if LINEARS > 2:
            sums2, through = _one_linear(values, ds, a, sums2, through, rows, num_rows, first_row, columns, num_inputs, ds_stride,
                                         key2_low, key2_high, threshold, 2, RANK, R, MASKED)
        _store(dx, through * factor, rows, num_rows, columns, num_inputs, num_inputs)
    da_parts += tl.program_id(1).to(tl.int64) * LINEARS * RANK * num_inputs
    _store(da_parts, sums0, ranks, RANK, columns, num_inputs, num_inputs)
    if LINEARS > 1:
        _store(da_parts + RANK * num_inputs, sums1, ranks, RANK, columns, num_inputs, num_inputs)
    if LINEARS > 2:
        _store(da_parts + 2 * RANK * num_inputs, sums2, ranks, RANK, columns, num_inputs, num_inputs)


@triton.jit(do_not_specialize=CHANGING)
def outer_kernel(s, b, bias, out, num_rows, num_outputs, s_stride, b_stride, factor,
                 RANK: tl.constexpr, R: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """factor S B' + bias: what the base's product is added to."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    weights = _load(b, columns, num_outputs, ranks, RANK, b_stride)
    values = tl.dot(_load(s, rows, num_rows, ranks, RANK, s_stride), tl.trans(weights)) * factor
    if HAS_BIAS:
        values += tl.load(bias + columns, mask=columns < num_outputs, other=0.0)[None, :]
    _store(out, values, rows, num_rows, columns, num_outputs, num_outputs)


@triton.jit
def _sum_block(parts, out, block, count, size, factor, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    here = parts + at
    for _ in range(count):
        total += tl.load(here, mask=inside, other=0.0)
        here += size
    tl.store(out + at, (total * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["factor", "count1", "count2"])
def sum_kernel(parts1, out1, count1, size1, parts2, out2, count2, size2, factor, BLOCK: tl.constexpr):
    """Two sums over the first dimension in one launch, in the order of the parts."""
    block = tl.program_id(0)
    blocks1 = tl.cdiv(size1, BLOCK)
    if block < blocks1:
        _sum_block(parts1, out1, block, count1, size1, factor, BLOCK)
    else:
        _sum_block(parts2, out2, block - blocks1, count2, size2, factor, BLOCK)
