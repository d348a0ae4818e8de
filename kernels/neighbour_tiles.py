"""The nearest gallery rows by a fast product, on a GPU: tiles append what is below a row's limit, the limits follow.

The limit is the last of the nearest found so far. While there are none, a piece of the gallery is as small as the
places that every row has for more; each further piece may be twice as large. Where some row finds more than it has
places for, as when the gallery comes nearer and nearer, the piece is met again in parts that cannot overflow.
Products, their splitting and their bound are those of `ranking_tiles`. b queries in a block.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fusionreid.kernels import ranking_kernels
from fusionreid.kernels._rows import Rows
from fusionreid.kernels.ranking_tiles import BLOCK_D, SPAN, TILE, Split, error_bound, launch, split_rows

QUERIES = 2**13
CAPACITY = 8 * TILE  # places of a row for what a piece of the gallery adds


class Candidates(NamedTuple):
    """All other rows are at least as far as the last candidate, by the fast product."""

    values: Tensor  # (b, count) fp32, ascending: |q - g|^2, within the bound
    indices: Tensor  # (b, count) int64
    farthest: Tensor  # (b,) fp32: the largest value
    bound: Tensor  # (b,) fp64


class Found(NamedTuple):
    """The nearest so far, in order, and CAPACITY places for more; places that are free hold an infinite value."""

    values: Tensor  # (b, count + CAPACITY) fp32
    columns: Tensor  # likewise, int32
    filled: Tensor  # (b,) int32 places
    farthest: Tensor  # (b,) fp32: the largest value

    @classmethod
    def nothing(cls, rows: int, count: int, device: torch.device) -> "Found":
        values = torch.full((rows, count + CAPACITY), torch.inf, device=device)
        columns = torch.zeros_like(values, dtype=torch.int32)
        return cls(values, columns, columns.new_zeros(rows), torch.full_like(values[:, 0], -torch.inf))


def nearest_by_tiles(queries: Rows, items: Rows, rows: slice, count: int) -> Candidates:
    """Of some of the queries, count of them each."""
    device = queries.features.device
    blocks = torch.arange(rows.start, rows.stop, device=device).split(QUERIES)
    return Candidates(*(torch.cat(parts) for parts in zip(*(_block(queries, items, block, count) for block in blocks))))


def _block(queries: Rows, items: Rows, block: Tensor, count: int) -> Candidates:
    query, length = split_rows(queries, block), queries.length[block]
    found, bound = Found.nothing(len(block), count, block.device), torch.zeros_like(length)
    size = CAPACITY
    for start, part in items.spans(SPAN):
        gallery, squares = split_rows(part, torch.arange(len(part), device=block.device)), part.length.square().float()
        bound = bound.maximum(error_bound(query, gallery, length, part.length.max(), part.features.shape[1]))
        first = 0
        while first < len(part):
            piece = slice(first, min(first + size, len(part)))
            append_piece(query, gallery, squares, piece, start, found, count)
            fits = int(found.filled.max()) <= CAPACITY
            if fits:
                _merge(found, count)
                first = piece.stop
            size = 2 * size if fits else CAPACITY
            found.values[:, count:] = torch.inf
            found.filled.zero_()
    square = length.square().float()
    values, columns = found.values[:, :count] + square[:, None], found.columns[:, :count].long()
    return Candidates(values, columns, found.farthest + square, bound)


def append_piece(
    query: Split, gallery: Split, squares: Tensor, piece: slice, start: int, found: Found, count: int
) -> None:
    """Of a piece of a span, which begins at row `start` of the gallery; squares (span,) fp32."""
    setting, number = launch(), piece.stop - piece.start
    tiles = triton.cdiv(len(found.filled), setting["ROWS"]) * triton.cdiv(number, setting["COLUMNS"])
    ranking_kernels.append[(tiles,)](
        query.parts, query.steps, gallery.parts[piece.start :], gallery.steps[piece.start :], squares[piece],
        found.values[:, count - 1 :], found.values[:, count:], found.columns[:, count:], found.filled, found.farthest,
        len(found.filled), number, start + piece.start, found.values.stride(0), query.parts.stride(0),
        CAPACITY=CAPACITY, BASE=ranking_kernels.BASE, BLOCK_D=BLOCK_D, **setting,
    )  # fmt: skip


def _merge(found: Found, count: int) -> None:
    values, order = found.values.topk(count, largest=False)
    found.columns[:, :count] = found.columns.gather(1, order)
    found.values[:, :count] = values
