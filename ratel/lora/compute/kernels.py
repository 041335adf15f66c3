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
"""In one launch."""
KEYS = ["key0_low", "key0_high", "key1_low", "key1_high", "key2_low", "key2_high"]
CHANGING = ["num_rows", "threshold", "factor", "first_row", *KEYS]
"""Arguments that change from call to call: a kernel made for their values would be compiled again
and again."""


@triton.jit
def _row_words(rows, key_low, key_high):
    key = (tl.cast(key_high, tl.uint32, bitcast=True).to(tl.uint64) << 32) | tl.cast(key_low, tl.uint32, bitcast=True).to(tl.uint64)
    z = rows.to(tl.uint64) * GOLDEN + key
    z = (z ^ (z >> 30)) * MIX1
    z = (z ^ (z >> 27)) * MIX2
    z = z ^ (z >> 31)
    return z.to(tl.uint32) | 1, (z >> 32).to(tl.uint32)


@triton.jit
def _kept(rows, columns, key_low, key_high, threshold):
    """[rows, columns], as masks.keep_mask has it; ``threshold`` as a signed number of 32 bits."""
    low, high = _row_words(rows, key_low, key_high)
    words = (columns + 1).to(tl.uint32) * COLUMN0
    words = (words ^ (words >> 16)) * COLUMN1
    words = words ^ (words >> 15)
    x = low[:, None] * words[None, :] + high[:, None]
    x = (x ^ (x >> 16)) * COLUMN2
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
def dropped_kernel(x, out, num_rows, num_columns, x_stride, threshold, factor, first_row, key0_low, key0_high,
                   BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    values = _load(x, rows, num_rows, columns, num_columns, x_stride)
    kept = _kept(first_row + rows, columns, key0_low, key0_high, threshold)
    _store(out, tl.where(kept, values.to(tl.float32) * factor, 0.0), rows, num_rows, columns, num_columns, num_columns)


@triton.jit(do_not_specialize=CHANGING)
def down_kernel(x, a, out, num_rows, num_inputs, x_stride, out_stride, part_stride, threshold, factor, first_row,
                key0_low, key0_high, key1_low, key1_high, key2_low, key2_high,
                LINEARS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
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
    weights = _load(b, columns, num_outputs, ranks, RANK, b_stride).to(dy.dtype.element_ty)
    ds_parts += tl.program_id(0).to(tl.int64) * num_rows * RANK
    db_parts += tl.program_id(1).to(tl.int64) * num_outputs * RANK
    sums = tl.zeros([R, BN], tl.float32)
    for step in range(steps):
        rows = begin + step * BM + tl.arange(0, BM)
        values = _load(dy, rows, num_rows, columns, num_outputs, dy_stride)
        _store(ds_parts, tl.dot(values, weights), rows, num_rows, ranks, RANK, RANK)
        sums = tl.dot(tl.trans(_load(s, rows, num_rows, ranks, RANK, s_stride)), values, sums)
    _store(db_parts, tl.trans(sums), columns, num_outputs, ranks, RANK, RANK)


@triton.jit(do_not_specialize=CHANGING)
def a_grads_kernel(x, ds, parts, num_rows, num_inputs, x_stride, ds_stride, threshold, first_row,
                   key0_low, key0_high, key1_low, key1_high, key2_low, key2_high,
                   LINEARS: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """One block of columns and some blocks of rows of x: those rows' part of one linear's dA.
    Programs of the same block and another linear run beside each other."""
    linear = tl.program_id(0) % LINEARS
    columns = (tl.program_id(0) // LINEARS) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    key_low = tl.where(linear == 0, key0_low, tl.where(linear == 1, key1_low, key2_low))
    key_high = tl.where(linear == 0, key0_high, tl.where(linear == 1, key1_high, key2_high))
    steps = tl.cdiv(num_rows, BM * tl.num_programs(1))
    begin = tl.program_id(1).to(tl.int64) * steps * BM
    ds += linear * RANK
    sums = tl.zeros([R, BN], tl.float32)
    for step in range(steps):
        rows = begin + step * BM + tl.arange(0, BM)
        values = _load(x, rows, num_rows, columns, num_inputs, x_stride)
        values = tl.where(_kept(first_row + rows, columns, key_low, key_high, threshold), values, 0.0)
        sums = tl.dot(tl.trans(_load(ds, rows, num_rows, ranks, RANK, ds_stride)), values, sums)
    parts += (tl.program_id(1).to(tl.int64) * LINEARS + linear) * RANK * num_inputs
    _store(parts, sums, ranks, RANK, columns, num_inputs, num_inputs)


@triton.jit
def _through(left, right, rows, num_rows, first_row, columns, num_columns, left_stride, rank_stride, column_stride, key_low, key_high,
             threshold, RANK: tl.constexpr, MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """A block of one linear's S B' or dS A, masked; 16 of the rank at a time, so that any rank
    needs little shared memory."""
    block = tl.zeros([BM, BN], tl.float32)
    for begin in tl.static_range(0, RANK, 16):
        ranks = begin + tl.arange(0, 16)
        at = ranks[:, None] * rank_stride + columns[None, :].to(tl.int64) * column_stride
        weights = tl.load(right + at, mask=(ranks < RANK)[:, None] & (columns < num_columns)[None, :], other=0.0)
        block = tl.dot(_load(left, rows, num_rows, ranks, RANK, left_stride), weights.to(left.dtype.element_ty), block)
    if MASKED:
        block = tl.where(_kept(first_row + rows, columns, key_low, key_high, threshold), block, 0.0)
    return block


@triton.jit
def _all_through(left, right, bias, rows, num_rows, first_row, columns, num_columns, left_stride, rank_stride, column_stride,
                 threshold, factor, key0_low, key0_high, key1_low, key1_high, key2_low, key2_high,
                 LINEARS: tl.constexpr, RANK: tl.constexpr, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr):
    """A block of what the adapters add: the sum over linears, times ``factor``, and the bias."""
    block = _through(left, right, rows, num_rows, first_row, columns, num_columns, left_stride, rank_stride, column_stride,
                     key0_low, key0_high, threshold, RANK, MASKED, BM, BN)
    if LINEARS > 1:
        block += _through(left + RANK, right + RANK * rank_stride, rows, num_rows, first_row, columns, num_columns, left_stride,
                          rank_stride, column_stride, key1_low, key1_high, threshold, RANK, MASKED, BM, BN)
    if LINEARS > 2:
        block += _through(left + 2 * RANK, right + 2 * RANK * rank_stride, rows, num_rows, first_row, columns, num_columns,
                          left_stride, rank_stride, column_stride, key2_low, key2_high, threshold, RANK, MASKED, BM, BN)
    block = block * factor
    if HAS_BIAS:
        block += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    return block


@triton.jit(do_not_specialize=CHANGING)
def through_kernel(left, right, bias, out, num_rows, num_columns, left_stride, rank_stride, column_stride, threshold, factor, first_row,
                   key0_low, key0_high, key1_low, key1_high, key2_low, key2_high,
                   LINEARS: tl.constexpr, RANK: tl.constexpr, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr):
    """What the adapters add, as a matrix to which cuBLAS adds the base's product."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    block = _all_through(left, right, bias, rows, num_rows, first_row, columns, num_columns, left_stride, rank_stride, column_stride,
                         threshold, factor, key0_low, key0_high, key1_low, key1_high, key2_low, key2_high,
                         LINEARS, RANK, MASKED, HAS_BIAS, BM, BN)
    _store(out, block, rows, num_rows, columns, num_columns, num_columns)


@triton.jit
def _added_product(sums, x, w, row, column, steps, TRANSPOSED: tl.constexpr, BK: tl.constexpr):
    for step in range(steps):
        values = x.load([row, step * BK])
        if TRANSPOSED:
            sums = tl.dot(values, w.load([column, step * BK]).T, sums)
        else:
            sums = tl.dot(values, w.load([step * BK, column]), sums)
    return sums


@triton.jit(do_not_specialize=CHANGING)
def product_kernel(x0, w0, x1, w1, x2, w2, out, left, right, bias, num_rows, num_columns, inner0, inner1, inner2,
                   left_stride, rank_stride, column_stride, threshold, factor, first_row,
                   key0_low, key0_high, key1_low, key1_high, key2_low, key2_high,
                   PRODUCTS: tl.constexpr, TRANSPOSED: tl.constexpr, LINEARS: tl.constexpr, RANK: tl.constexpr,
                   MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                   GROUP: tl.constexpr, PROGRAMS: tl.constexpr):
    """The sum of up to three products x w (w' where TRANSPOSED) and of what the adapters add, which
    is what the accumulators begin with: no matrix is read or written for it. Blocks come through
    tensor descriptors; a program does every PROGRAMS-th block, in groups of GROUP rows of
    blocks."""
    row_blocks = tl.cdiv(num_rows, BM)
    column_blocks = tl.cdiv(num_columns, BN)
    for block in range(tl.program_id(0), row_blocks * column_blocks, PROGRAMS):
        first = (block // (GROUP * column_blocks)) * GROUP
        height = min(row_blocks - first, GROUP)
        within = block % (GROUP * column_blocks)
        row = (first + within % height) * BM
        column = (within // height) * BN
        rows = row + tl.arange(0, BM)
        columns = column + tl.arange(0, BN)
        sums = _all_through(left, right, bias, rows, num_rows, first_row, columns, num_columns, left_stride, rank_stride, column_stride,
                            threshold, factor, key0_low, key0_high, key1_low, key1_high, key2_low, key2_high,
                            LINEARS, RANK, MASKED, HAS_BIAS, BM, BN)
        sums = _added_product(sums, x0, w0, row, column, tl.cdiv(inner0, BK), TRANSPOSED, BK)
        if PRODUCTS > 1:
            sums = _added_product(sums, x1, w1, row, column, tl.cdiv(inner1, BK), TRANSPOSED, BK)
        if PRODUCTS > 2:
            sums = _added_product(sums, x2, w2, row, column, tl.cdiv(inner2, BK), TRANSPOSED, BK)
        out.store([row, column], sums.to(out.dtype))


@triton.jit
def _sum_block(parts, out, block, count, size, factor, ROUNDED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, PARTS):
        numbers = begin + tl.arange(0, PARTS)
        inside = (numbers < count)[:, None] & (at < size)[None, :]
        some = tl.load(parts + numbers[:, None].to(tl.int64) * size + at[None, :], mask=inside, other=0.0)
        total += tl.sum(some, axis=0)
    tl.store(out + at, (total * factor).to(ROUNDED).to(out.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["factor", "count1", "count2"])
def sum_kernel(parts1, out1, parts2, out2, count1, size1, count2, size2, factor, ROUNDED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Two sums over the first dimension in one launch; PARTS at a time are on their way from
    memory."""
    block = tl.program_id(0)
    blocks1 = tl.cdiv(size1, BLOCK)
    if block < blocks1:
        _sum_block(parts1, out1, block, count1, size1, factor, ROUNDED, PARTS, BLOCK)
    else:
        _sum_block(parts2, out2, block - blocks1, count2, size2, factor, ROUNDED, PARTS, BLOCK)
