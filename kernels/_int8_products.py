"""Products of feature rows in 8-bit integers on a GPU's tensor cores, with a proven error bound.

A row is split into integers, x = step (x0 + x1 / BASE + x2 / BASE^2) + rest, and six of the nine products of integers
in x y are summed in int32: exactly, as 3 * 127^2 * WIDEST < 2^31. The error of a sum of half-precision products would
depend on how a GPU rounds inside its matrix instructions, which no vendor documents.

The bound. Let n1, n2, n3 be the norms of the parts x1 and x2 and of the rest, in the features' unit. Left out of x y is
x1 y2 + x2 y1 + x2 y2 + rest_x y + (x - rest_x) rest_y, by Cauchy and Schwarz at most

    n1 n2' + n2 n1' + n2 n2' + n3 |y| + (|x| + n3) n3'.

Sums and steps are then rounded to fp32 and joined: 11 roundings of u = 2^-24 at most, of numbers no larger in sum than
A A', with A = |x| + 2 (n1 + n2 + n3) and so at least the norms of all parts together. Twice that, and a rounding each
of |y|^2, of |y|^2 - 2 x y and of the threshold, make 26 u A A' + 3 u |y|^2. In all some 70 u for unit rows of 5888
normal coordinates, a quarter of the bound of an fp32 product in chunks.
Q queries, G gallery, D width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusionreid.kernels._exact_distances import UNIT, Rows, load_columns
from fusionreid.kernels._path import TRITON, capability

BASE = 254  # a residue of half a unit becomes 127 at most
WIDEST = 2**15  # columns
SPAN = 2**14  # gallery rows at once: 3 D bytes each
TILE = 128  # split rows are padded to whole tiles
BLOCK_D = 64


class Split(NamedTuple):
    """Rows as integers, the last ones zero, up to whole tiles."""

    parts: Tensor  # (rows, 3 * columns) int8
    steps: Tensor  # (rows,) fp32
    norms: Tensor  # (3, rows) fp64: of x1, of x2, of the rest


def split_rows(rows: Rows, index: Tensor) -> Split:
    """Some rows, at unit length if normalised."""
    count, width = triton.cdiv(len(index), TILE) * TILE, rows.features.shape[1]
    parts = index.new_empty(count, 3 * BLOCK_D * triton.cdiv(width, BLOCK_D), dtype=torch.int8)
    steps, norms = torch.empty_like(parts[:, 0], dtype=torch.float32), rows.scale.new_empty(3, count)
    split_kernel[(count // 16,)](
        rows.features, index, rows.scale, parts, steps, norms, len(index), width,
        parts.stride(0), BASE=BASE, BLOCK_D=BLOCK_D, ROWS=16, BLOCK=64, num_warps=4,
    )  # fmt: skip
    return Split(parts, steps, norms)


def launch() -> dict[str, int]:
    """Three sums per pair fill Hopper's registers with a tile of 128 x 128, and those of others, or of compilers before
    Triton 3.8, with half of it."""
    return {
        "ROWS": 128,
        "COLUMNS": 128 if capability() == 90 and TRITON >= (3, 8) else 64,
        "GROUP": 12,
        "num_warps": 8,
        "num_stages": 3,
    }


def error_bound(query: Split, gallery: Split, length: Tensor, longest: Tensor, width: int) -> Tensor:
    """How far |y|^2 - 2 x y and a query's rounded threshold can be off (Q,); length (Q,), longest of the gallery ()."""
    n1, n2, n3 = query.norms[:, : len(length)]
    m1, m2, m3 = gallery.norms.amax(1)
    left_out = n1 * m2 + n2 * m1 + n2 * m2 + n3 * longest + (length + n3) * m3
    rounded = 26 * (length + 2 * (n1 + n2 + n3)) * (longest + 2 * (m1 + m2 + m3)) + 3 * longest.square()
    in_double = 8 * (width + 16) * 2.0**-53 * (length + longest).square()  # the exact distances, the lengths
    return 1.01 * (2 * left_out + UNIT * rounded) + in_double + 1e-36  # the last: products below fp32's normal range


@triton.jit
def split_kernel(
    x_ptr, rows_ptr, scale_ptr, parts_ptr, step_ptr, norms_ptr, N, D, SPLIT_STRIDE, BASE: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows into integers. norms (3, places) are those of x1, x2 and the rest, in the features' unit."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = place < N
    row = tl.load(rows_ptr + place, mask=within, other=0)
    highest = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in tl.range(0, D, BLOCK):
        highest = tl.maximum(highest, tl.abs(load_columns(x_ptr, row, within, first, D, BLOCK)))
    unit = tl.maximum(tl.max(highest, 1), 1e-30) / 127
    per_unit = (1 / unit)[:, None]
    squares1 = tl.zeros((ROWS, BLOCK), tl.float64)
    squares2 = tl.zeros((ROWS, BLOCK), tl.float64)
    squares3 = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in tl.range(0, SPLIT_STRIDE // 3, BLOCK):
        x = load_columns(x_ptr, row, within, first, D, BLOCK) * per_unit
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
def tile_of(Q, G, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The rows and columns of this program; neighbouring programs share what they load through the cache."""
    row_tiles, column_tiles = tl.cdiv(Q, ROWS), tl.cdiv(G, COLUMNS)
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    height = tl.minimum(GROUP, row_tiles - group * GROUP)
    program -= group * (GROUP * column_tiles)
    row = (group * GROUP + program % height) * ROWS + tl.arange(0, ROWS)
    return row, program // height * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def values_of(
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
