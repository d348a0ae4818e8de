"""Tiles of the matrix of squares |x - y|^2 on and above its diagonal: their order, and their values in float32 grade.

N images, D width of a head.
"""

# Triton reads its own annotations.
import triton
import triton.language as tl

GROUP = tl.constexpr(8)  # columns of tiles that are worked off together, so that L2 serves most of their loads


@triton.jit
def place(tile, blocks):
    """Row and column of a tile of the upper triangle, column group by column group, each row by row."""
    group = _root(tile) // GROUP * GROUP  # its first column; before it lie all tiles of the columns before it
    tile -= group * (group + 1) // 2
    columns = tl.minimum(GROUP, blocks - group)
    square = group * columns  # tiles above the group's own triangle
    corner = tl.maximum(tile - square, 0)
    column = _root(corner)
    inside = tile < square
    row = tl.where(inside, tile // columns, group + corner - column * (column + 1) // 2)
    return row, group + tl.where(inside, tile % columns, column)


@triton.jit
def _root(tile):
    """The largest n with n (n + 1) / 2 <= tile, which is a column: its tiles have the numbers from there on."""
    n = ((tl.sqrt_rn(8.0 * tile.to(tl.float32) + 1) - 1) / 2).to(tl.int32)
    n -= (n * (n + 1) // 2 > tile).to(tl.int32)
    return n + ((n + 1) * (n + 2) // 2 <= tile).to(tl.int32)


@triton.jit
def squares(x_ptr, width, stride, row, column, N, ROWS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """|x - y|^2 of a tile, not below 0. SPLIT warps share the width of a small tile, else they share a large one."""
    if SPLIT > 1:
        products, of_rows, of_columns = _split_products(x_ptr, width, stride, row, column, N, ROWS, SPLIT, BLOCK_D)
    else:
        products, of_rows, of_columns = _tiled_products(x_ptr, width, stride, row, column, N, ROWS, BLOCK_D)
    result = of_rows[:, None] + (of_columns[None, :] - 2 * products)
    return tl.where(result <= 0, 0.0, result)


@triton.jit
def _tiled_products(x_ptr, width, stride, row, column, N, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    products = tl.zeros((ROWS, ROWS), tl.float32)
    of_rows, of_columns = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    rows_ptr = x_ptr + row.to(tl.int64)[:, None] * stride
    columns_ptr = x_ptr + column.to(tl.int64)[:, None] * stride
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(rows_ptr + d, mask=(row < N)[:, None] & (d < width), other=0.0)  # [ROWS, BLOCK_D]
        y = tl.load(columns_ptr + d, mask=(column < N)[:, None] & (d < width), other=0.0)
        products += _products(x, tl.trans(y))
        of_rows += tl.sum(_square(x), 1)
        of_columns += tl.sum(_square(y), 1)
    return products, of_rows, of_columns


@triton.jit
def _split_products(x_ptr, width, stride, row, column, N, ROWS: tl.constexpr, SPLIT: tl.constexpr,
                    BLOCK_D: tl.constexpr):  # fmt: skip
    """The next step's loads are under way while a step computes: asynchronous copies would lie unswizzled."""
    products = tl.zeros((SPLIT, ROWS, ROWS), tl.float32)
    of_rows = tl.zeros((ROWS, SPLIT, BLOCK_D), tl.float32)
    of_columns = tl.zeros((ROWS, SPLIT, BLOCK_D), tl.float32)
    rows_ptr = x_ptr + row.to(tl.int64)[:, None, None] * stride
    columns_ptr = x_ptr + column.to(tl.int64)[:, None, None] * stride
    d = tl.arange(0, SPLIT)[None, :, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, None, :]
    x = tl.load(rows_ptr + d, mask=(row < N)[:, None, None] & (d < width), other=0.0)  # [ROWS, SPLIT, BLOCK_D]
    y = tl.load(columns_ptr + d, mask=(column < N)[:, None, None] & (d < width), other=0.0)
    for _ in tl.range(0, width, SPLIT * BLOCK_D, num_stages=1):
        d += SPLIT * BLOCK_D
        next_x = tl.load(rows_ptr + d, mask=(row < N)[:, None, None] & (d < width), other=0.0)
        next_y = tl.load(columns_ptr + d, mask=(column < N)[:, None, None] & (d < width), other=0.0)
        products += _products(tl.permute(x, (1, 0, 2)), tl.permute(y, (1, 2, 0)))
        of_rows += _square(x)
        of_columns += _square(y)
        x, y = next_x, next_y
    return tl.sum(products, 0), tl.sum(tl.sum(of_rows, 2), 1), tl.sum(tl.sum(of_columns, 2), 1)


@triton.jit
def _square(x):
    x = x.to(tl.float32)
    return x * x


@triton.jit
def _products(x, y):
    """x y to 2^-21. Of float32: three tf32 products; `tf32x3` takes 13 instructions to halve a value, this takes 5."""
    if x.dtype == tl.float32:
        large_x, large_y = _tf32(x), _tf32(y)
        products = tl.dot(_tf32(x - large_x), large_y, input_precision="tf32")
        products = tl.dot(large_x, _tf32(y - large_y), products, input_precision="tf32")
        products = tl.dot(large_x, large_y, products, input_precision="tf32")
    else:
        products = tl.dot(x, y)
    return products


@triton.jit
def _tf32(x):
    """Rounded to 11 significant bits."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
