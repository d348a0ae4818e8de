"""The kernels behind ranks on a GPU: fp64 lengths and distances, features as 8-bit integers, and counting by tiles.

Q queries, G gallery, D width, T most matches of one query. A row x of features is split into three rows of integers,
x = step * (x0 + x1 / BASE + x2 / BASE^2) + rest; the products of integers and their sums are exact. In memory a split
row is made of blocks of BLOCK_D coordinates: those of x0, then x1, then x2.
"""

import triton
import triton.language as tl

BASE = 254  # a residue of half a unit becomes 127 at most


@triton.jit
def lengths(x_ptr, length_ptr, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """sqrt(sum_d x[row, d]^2) in fp64."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in tl.range(0, D, BLOCK):
        x = _load(x_ptr, row, row < N, first, D, BLOCK)
        total += x * x
    tl.store(length_ptr + row, tl.sqrt(tl.sum(total, 1)), mask=row < N)


@triton.jit
def distances(
    x_ptr, y_ptr, x_scale_ptr, y_scale_ptr, x_rows_ptr, y_rows_ptr, distance_ptr, P, D,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_d (x - y)^2 of pairs of scaled rows in fp64; the order of the sum depends on D alone."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    within = pair < P
    x_row, y_row = tl.load(x_rows_ptr + pair, mask=within, other=0), tl.load(y_rows_ptr + pair, mask=within, other=0)
    x_scale, y_scale = tl.load(x_scale_ptr + x_row)[:, None], tl.load(y_scale_ptr + y_row)[:, None]
    total = tl.zeros((PAIRS, BLOCK), tl.float64)
    for first in tl.range(0, D, BLOCK):
        x, y = _load(x_ptr, x_row, within, first, D, BLOCK), _load(y_ptr, y_row, within, first, D, BLOCK)
        difference = x * x_scale - y * y_scale
        total += difference * difference
    tl.store(distance_ptr + pair, tl.sum(total, 1), mask=within)


@triton.jit
def _load(x_ptr, row, within, first, D, BLOCK: tl.constexpr):
    """Columns first..first + BLOCK of some rows in fp64, [rows, BLOCK]."""
    d = first + tl.arange(0, BLOCK)
    return tl.load(x_ptr + row[:, None] * D + d, mask=within[:, None] & (d < D), other=0.0).to(tl.float64)


@triton.jit
def split(
    x_ptr, rows_ptr, scale_ptr, parts_ptr, step_ptr, norms_ptr, N, D, SPLIT_STRIDE, BASE: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows into integers. norms (3, places) are those of x1, x2 and the rest, in the features' unit."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = place < N
    row = tl.load(rows_ptr + place, mask=within, other=0)
    highest = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in tl.range(0, D, BLOCK):
        highest = tl.maximum(highest, tl.abs(_load(x_ptr, row, within, first, D, BLOCK)))
    unit = tl.maximum(tl.max(highest, 1), 1e-30) / 127
    per_unit = (1 / unit)[:, None]
    squares1 = tl.zeros((ROWS, BLOCK), tl.float64)
    squares2 = tl.zeros((ROWS, BLOCK), tl.float64)
    squares3 = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in tl.range(0, SPLIT_STRIDE // 3, BLOCK):
        x = _load(x_ptr, row, within, first, D, BLOCK) * per_unit
        x0 = tl.floor(x + 0.5)
        x = (x - x0) * BASE
        x1 = tl.floor(x + 0.5)
        x = (x - x1) * BASE
        x2 = tl.floor(x + 0.5)
        x -= x2
        squares1 += x1 * x1
        squares2 += x2 * x2
        squares3 += x * x
        d = first + tl.arange(0, BLOCK)
        at = parts_ptr + place[:, None] * SPLIT_STRIDE + d // BLOCK_D * (3 * BLOCK_D) + d % BLOCK_D
        mask = (d < SPLIT_STRIDE // 3)[None, :]
        tl.store(at, x0.to(tl.int8), mask=mask)
        tl.store(at + BLOCK_D, x1.to(tl.int8), mask=mask)
        tl.store(at + 2 * BLOCK_D, x2.to(tl.int8), mask=mask)
    step = unit * tl.load(scale_ptr + row)
    places = tl.num_programs(0) * ROWS
    tl.store(step_ptr + place, step.to(tl.float32))
    tl.store(norms_ptr + place, step / BASE * tl.sqrt(tl.sum(squares1, 1)))
    tl.store(norms_ptr + places + place, step / (BASE * BASE) * tl.sqrt(tl.sum(squares2, 1)))
    tl.store(norms_ptr + 2 * places + place, step / (BASE * BASE) * tl.sqrt(tl.sum(squares3, 1)))


@triton.jit
def count(
    x_ptr, x_step_ptr, x_person_ptr, y_ptr, y_step_ptr, y_square_ptr, y_person_ptr, lower_ptr, upper_ptr, tally_ptr,
    noted_ptr, pairs_ptr, Q, G, T, SPLIT_STRIDE, CAPACITY: tl.constexpr, BASE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of queries and gallery. Of every match, farthest first: tally (T, Q) counts the columns surely before it,
    and the pairs that are left open are noted down: the match as t * Q + query, CAPACITY
    further on the column."""
    row, column = _tile(Q, G, ROWS, COLUMNS, GROUP)
    value = _values(
        x_ptr, x_step_ptr, y_ptr, y_step_ptr, y_square_ptr, row, column, G, SPLIT_STRIDE, BASE, ROWS, COLUMNS, BLOCK_D
    )
    x_person = tl.load(x_person_ptr + row, mask=row < Q, other=0)
    y_person = tl.load(y_person_ptr + column, mask=column < G, other=0)
    value = tl.where(x_person[:, None] == y_person[None, :], float("inf"), value)  # not counted here
    nearest = tl.min(value, 1)
    t = 0
    upper = tl.load(upper_ptr + row, mask=row < Q, other=float("-inf"))
    while tl.max((nearest <= upper).to(tl.int32), 0) > 0:  # upper falls with t
        lower = tl.load(lower_ptr + t * Q + row, mask=row < Q, other=float("-inf"))
        before = tl.sum((value < lower[:, None]).to(tl.int32), 1)
        tl.atomic_add(tally_ptr + t * Q + row, before, mask=before > 0, sem="relaxed")
        not_after = tl.sum((value <= upper[:, None]).to(tl.int32), 1)
        if tl.max(not_after - before, 0) > 0:
            is_open = (value <= upper[:, None]) & (value >= lower[:, None])
            one = tl.full((ROWS, COLUMNS), 1, tl.int64)
            slot = tl.atomic_add(noted_ptr + tl.zeros((ROWS, COLUMNS), tl.int32), one, mask=is_open, sem="relaxed")
            fits = is_open & (slot < CAPACITY)  # in any order: a sum of integers follows
            tl.store(pairs_ptr + slot, tl.broadcast_to((t * Q + row)[:, None], (ROWS, COLUMNS)), mask=fits)
            tl.store(pairs_ptr + CAPACITY + slot, tl.broadcast_to(column[None, :], (ROWS, COLUMNS)), mask=fits)
        t += 1
        upper = tl.load(upper_ptr + t * Q + row, mask=(row < Q) & (t < T), other=float("-inf"))


@triton.jit
def append(
    x_ptr, x_step_ptr, y_ptr, y_step_ptr, y_square_ptr, limit_ptr, values_ptr, columns_ptr, filled_ptr, farthest_ptr,
    Q, G, FIRST, VALUES_STRIDE, SPLIT_STRIDE, CAPACITY: tl.constexpr, BASE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of queries and gallery. What is below the limit of its row, the nearest first, is appended to the row's
    places, values and columns, as far as CAPACITY goes; filled (Q,) counts on. farthest (Q,) is the largest value."""
    row, column = _tile(Q, G, ROWS, COLUMNS, GROUP)
    value = _values(
        x_ptr, x_step_ptr, y_ptr, y_step_ptr, y_square_ptr, row, column, G, SPLIT_STRIDE, BASE, ROWS, COLUMNS, BLOCK_D
    )
    peak = tl.max(tl.where((column < G)[None, :], value, float("-inf")), 1)
    tl.atomic_max(farthest_ptr + row, peak, mask=row < Q, sem="relaxed")
    limit = tl.load(limit_ptr + row.to(tl.int64) * VALUES_STRIDE, mask=row < Q, other=float("-inf"))
    nearest, place = tl.min(value, 1, return_indices=True)
    while tl.max((nearest < limit).to(tl.int32), 0) > 0:
        near = nearest < limit  # past the gallery values are infinite
        slot = tl.atomic_add(filled_ptr + row, 1, mask=near, sem="relaxed")
        fits = near & (slot < CAPACITY)
        at = row.to(tl.int64) * VALUES_STRIDE + slot
        tl.store(values_ptr + at, nearest, mask=fits)
        tl.store(columns_ptr + at, FIRST + tl.min(column, 0) + place, mask=fits)
        taken = near[:, None] & (tl.arange(0, COLUMNS)[None, :] == place[:, None])
        value = tl.where(taken, float("inf"), value)
        nearest, place = tl.min(value, 1, return_indices=True)


@triton.jit
def _tile(Q, G, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The rows and columns of this program; neighbouring programs share what they load through the cache."""
    row_tiles, column_tiles = tl.cdiv(Q, ROWS), tl.cdiv(G, COLUMNS)
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    height = tl.minimum(GROUP, row_tiles - group * GROUP)
    program -= group * (GROUP * column_tiles)
    row = (group * GROUP + program % height) * ROWS + tl.arange(0, ROWS)
    return row, program // height * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _values(
    x_ptr, x_step_ptr, y_ptr, y_step_ptr, y_square_ptr, row, column, G, SPLIT_STRIDE, BASE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """|y|^2 - 2 x y, infinite past the gallery, [ROWS, COLUMNS] fp32."""
    dot = _product(x_ptr, y_ptr, row, column, SPLIT_STRIDE, BASE, ROWS, COLUMNS, BLOCK_D)
    x_step, y_step = tl.load(x_step_ptr + row), tl.load(y_step_ptr + column)
    square = tl.load(y_square_ptr + column, mask=column < G, other=float("inf"))
    return square[None, :] - 2 * (dot * x_step[:, None] * y_step[None, :])


@triton.jit
def _product(
    x_ptr, y_ptr, row, column, SPLIT_STRIDE, BASE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x y / (x_step y_step) but for the products of x1 y2, x2 y1, x2 y2 and of the rests, [ROWS, COLUMNS] fp32."""
    d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + row.to(tl.int64)[:, None] * SPLIT_STRIDE + d[None, :]
    y_at = y_ptr + column.to(tl.int64)[None, :] * SPLIT_STRIDE + d[:, None]
    high = tl.zeros((ROWS, COLUMNS), tl.int32)
    middle = tl.zeros((ROWS, COLUMNS), tl.int32)
    low = tl.zeros((ROWS, COLUMNS), tl.int32)
    for _ in tl.range(0, SPLIT_STRIDE, 3 * BLOCK_D):
        x0, x1, x2 = tl.load(x_at), tl.load(x_at + BLOCK_D), tl.load(x_at + 2 * BLOCK_D)  # [ROWS, BLOCK_D]
        y0, y1, y2 = tl.load(y_at), tl.load(y_at + BLOCK_D), tl.load(y_at + 2 * BLOCK_D)  # [BLOCK_D, COLUMNS]
        high = tl.dot(x0, y0, high, out_dtype=tl.int32)
        middle = tl.dot(x0, y1, middle, out_dtype=tl.int32)
        middle = tl.dot(x1, y0, middle, out_dtype=tl.int32)
        low = tl.dot(x1, y1, low, out_dtype=tl.int32)
        low = tl.dot(x0, y2, low, out_dtype=tl.int32)
        low = tl.dot(x2, y0, low, out_dtype=tl.int32)
        x_at += 3 * BLOCK_D
        y_at += 3 * BLOCK_D
    tail = middle.to(tl.float32) + low.to(tl.float32) * (1 / BASE)
    return high.to(tl.float32) + tail * (1 / BASE)
