"""The k nearest gallery rows of every query, exactly:  the order of the fp64 squared distances, ties by gallery index.

Candidates, k + SPARE per query, come from a fast product. Where two of them are nearer to each other than twice the
error bound, fp64 distances decide. All other rows are at least as far as the last candidate, less the bound: a query
whose k-th does not clear that is compared again with all rows that the bound cannot exclude.

On a CPU the product is in fp32, with a running top-k. On a GPU it is in 8-bit integers: tiles append what is below a
row's limit, the last of its nearest so far. While there are none, a piece of the gallery is as small as the places that
every row has for more; each further piece may be twice as large. Where some row finds more than it has places for, as
when the gallery comes nearer and nearer, the piece is repeated in parts that cannot overflow.
Q queries, G gallery, D width, b queries in a block.
"""

from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fusionreid.kernels import _int8_products as int8
from fusionreid.kernels._exact_distances import (
    LONGEST,
    UNIT,
    Rows,
    chunks,
    error_bound,
    exact_distances,
    fast_distances,
    fast_tile,
    full_precision,
    scaled,
)
from fusionreid.kernels._path import use_triton

BLOCK = 2048  # rows and columns of a product
AGAIN_ROWS = 64
SPARE = 8
QUERIES = 2**13  # at once on a GPU
IN_CACHE = 2**10  # rows converted to fp32 at once
SHORTEST = 1e-12  # length whose square fp32 holds well
CAPACITY = 8 * int8.TILE  # places of a row for what a piece of the gallery adds, on a GPU


class Neighbours(NamedTuple):
    distances: Tensor  # (Q, k) fp64, squared, ascending
    indices: Tensor  # (Q, k) int64
    farthest: Tensor  # (Q,) fp32, squared: of the farthest row, by the fast product


def nearest_neighbours(query: Tensor, gallery: Tensor, k: int, *, normalize: bool = False) -> Neighbours:
    """Find the k nearest rows of the gallery (G, D) for every query (Q, D), 1 <= k <= G.

    With normalize, features are brought to unit length. ValueError if shapes, types or devices do not fit, or features
    are not finite.
    """
    _check("nearest_neighbours", k, gallery)
    with full_precision(query):
        queries, items = Rows.both(query, gallery, normalize)
        found = _nearest(queries, items, slice(0, len(queries)), k)
        rows = torch.arange(len(queries), device=query.device).repeat_interleave(k)
        distances = exact_distances(queries, items, rows, found.indices.flatten()).view_as(found.indices)
    return found._replace(distances=distances)


def neighbour_lists(features: Tensor, k: int, *, rows: slice | None = None, normalize: bool = False) -> Neighbours:
    """Find the k nearest of all rows (N, D) for each row, itself included, or for some consecutive `rows`.

    Takes half the products of `nearest_neighbours`, as d(i, j) = d(j, i). The order is exact; distances that it did not
    need in fp64 have the error of an fp32 product.
    """
    _check("neighbour_lists", k, features)
    rows = slice(0, len(features)) if rows is None else rows
    if (
        None in (rows.start, rows.stop)
        or rows.step not in (None, 1)
        or not 0 <= rows.start <= rows.stop <= len(features)
    ):
        raise ValueError(f"neighbour_lists: rows must be consecutive ones among {len(features)}, got {rows}")
    with full_precision(features):
        items, _ = Rows.both(features, features, normalize)
        return _nearest(items, items, rows, k)


def may_be_nearer(query: Tensor, gallery: Tensor, distances: Tensor) -> Tensor:
    """Find the rows of the gallery (G, D) that may be nearer to a query (Q, D) than its squared `distances` (Q,).

    Returns their indices, ascending, of all queries together; rows are meant at unit length, as by `normalize`. Takes
    a fraction of `nearest_neighbours`: products and lengths in fp32, each of which errs by less than D roundings.
    """
    found = []
    with full_precision(query):
        query = F.normalize(query.float())
        least = (1 + query.double().square().sum(1) - distances.double()) / 2  # cosine
        least = (least - 4 * (query.shape[1] + 8) * UNIT).float()  # of product, both lengths, and one to spare
        for first, rows in zip(range(0, len(gallery), IN_CACHE), gallery.split(IN_CACHE)):
            rows = rows.float()
            length = torch.linalg.vector_norm(rows, dim=1)
            far = (rows @ query.T < least * length[:, None]).all(1) & (length > SHORTEST) & (length < LONGEST)
            found.append((~far).nonzero().flatten() + first)
    return torch.cat(found)


def _check(op: str, k: int, gallery: Tensor) -> None:
    if not isinstance(k, Integral) or not 1 <= k <= len(gallery):
        raise ValueError(f"{op}: k must be an integer from 1 to {len(gallery)}, the size of the gallery, got {k}")


class Candidates(NamedTuple):
    """All other rows are at least as far as the last candidate, by the fast product."""

    values: Tensor  # (b, count) fp32, ascending: |q - g|^2, within the bound
    indices: Tensor  # (b, count) int64
    farthest: Tensor  # (b,) fp32: the largest value
    bound: Tensor  # (b,) fp64


class _Running:
    """The nearest so far and the farthest of some rows, by the fast product."""

    def __init__(self, num_rows: int, count: int, device: torch.device) -> None:
        self.values = torch.full((num_rows, count), torch.inf, device=device)  # fp32, ascending
        self.indices = torch.zeros(num_rows, count, dtype=torch.int64, device=device)
        self.farthest = torch.full((num_rows,), -torch.inf, device=device)

    def add(self, rows: slice, values: Tensor, first_column: int) -> None:
        """Distances (b, w) of these rows to consecutive columns."""
        self.farthest[rows] = torch.maximum(values.amax(1), self.farthest[rows])
        count = self.values.shape[1]
        near = values.topk(min(count, values.shape[1]), largest=False)
        both = torch.cat([self.values[rows], near.values], 1)
        places = torch.cat([self.indices[rows], near.indices + first_column], 1)
        self.values[rows], order = both.topk(count, largest=False)
        self.indices[rows] = places.gather(1, order)


def _nearest(queries: Rows, items: Rows, rows: slice, k: int) -> Neighbours:
    count, device = min(k + SPARE, len(items)), queries.features.device
    if rows.start == rows.stop:
        none = torch.zeros(0, k, dtype=torch.int64, device=device)
        return Neighbours(none.double(), none, none[:, 0].float())
    tiles = use_triton(queries.features) and queries.features.shape[1] <= int8.WIDEST
    candidates = (nearest_by_tiles if tiles else _nearest_by_blocks)(queries, items, rows, count)
    longest = torch.maximum(queries.length[rows], items.length.max())
    bound = candidates.bound + 6 * UNIT * longest.square()  # |q|^2 and the sum with it are rounded
    blocks = torch.arange(rows.start, rows.stop, device=device).split(BLOCK)
    some = (t.split(BLOCK) for t in (candidates.values, candidates.indices, bound))
    parts = [_ordered(queries, items, k, *block) for block in zip(blocks, *some, strict=True)]
    distances, indices = (torch.cat(columns) for columns in zip(*parts))
    return Neighbours(distances, indices, candidates.farthest.clamp_min(0))


def _nearest_by_blocks(queries: Rows, items: Rows, rows: slice, count: int) -> Candidates:
    running = _Running(rows.stop - rows.start, count, queries.features.device)
    symmetric = queries is items
    inner = _blocks(rows.start, rows.stop)
    outer = [*_blocks(0, rows.start), *inner, *_blocks(rows.stop, len(items))] if symmetric else _blocks(0, len(items))
    memory = running.values.new_empty(3, BLOCK * BLOCK)
    for block in inner:
        query, square = chunks(scaled(queries, block)), queries.length[block, None].square().float()
        own = slice(block.start - rows.start, block.stop - rows.start)
        for columns in outer:
            mirrored = symmetric and rows.start <= columns.start < rows.stop
            if mirrored and columns.start < block.start:
                continue  # its mirror image has been seen
            values = fast_tile(query, items, columns, memory).add_(square)
            running.add(own, values, columns.start)
            if mirrored and columns.start > block.start:
                theirs = slice(columns.start - rows.start, columns.stop - rows.start)
                running.add(theirs, values.T.contiguous(), block.start)
    return Candidates(running.values, running.indices, running.farthest, error_bound(queries, items, rows))


def _blocks(start: int, stop: int) -> list[slice]:
    return [slice(first, min(first + BLOCK, stop)) for first in range(start, stop, BLOCK)]


def _ordered(
    queries: Rows, items: Rows, k: int, rows: Tensor, fast: Tensor, indices: Tensor, bound: Tensor
) -> tuple[Tensor, Tensor]:
    """Distances and indices (b, k) of some rows (b,) in exact order, from their candidates (b, count)."""
    distances = fast.double()
    too_close = distances.diff(dim=1) <= 2 * bound[:, None]
    r, p = (F.pad(too_close, (1, 0)) | F.pad(too_close, (0, 1))).nonzero(as_tuple=True)
    distances[r, p] = exact_distances(queries, items, rows[r], indices[r, p])
    indices, order = indices.sort(dim=1)
    distances, order = distances.gather(1, order).sort(dim=1, stable=True)
    distances, indices = distances[:, :k].clamp_min_(0), indices.gather(1, order)[:, :k]
    if fast.shape[1] < len(items):
        most = distances[:, -1] + bound
        unsure = (most >= fast[:, -1] - bound).nonzero().flatten()
        for part in unsure.split(AGAIN_ROWS) if len(unsure) else ():
            distances[part], indices[part] = _again(queries, items, rows[part], most[part], k)
    return distances, indices


def _again(queries: Rows, items: Rows, rows: Tensor, most: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and indices (b, k) in fp64, among all items that may be no farther than `most` (b,)."""
    limit = (most + error_bound(queries, items, rows) - queries.length[rows].square()).float()[:, None]
    found = []
    for columns, values in fast_distances(scaled(queries, rows), items, BLOCK):
        r, c = (values <= limit).nonzero(as_tuple=True)
        found.append((r, c + columns.start))
    r, c = (torch.cat(parts) for parts in zip(*found))
    distances = exact_distances(queries, items, rows[r], c)
    order = distances.argsort(stable=True)  # c ascends within a row: ties by gallery index
    order = order[r[order].argsort(stable=True)]
    counts = torch.bincount(r, minlength=len(rows))
    place = order[(counts.cumsum(0) - counts)[:, None] + torch.arange(k, device=order.device)]
    return distances[place], c[place]


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
    query, length = int8.split_rows(queries, block), queries.length[block]
    found, bound = Found.nothing(len(block), count, block.device), torch.zeros_like(length)
    size = CAPACITY
    for start, part in items.spans(int8.SPAN):
        gallery = int8.split_rows(part, torch.arange(len(part), device=block.device))
        squares = part.length.square().float()
        bound = bound.maximum(int8.error_bound(query, gallery, length, part.length.max(), part.features.shape[1]))
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
    query: int8.Split, gallery: int8.Split, squares: Tensor, piece: slice, start: int, found: Found, count: int
) -> None:
    """Of a piece of a span, which begins at row `start` of the gallery; squares (span,) fp32."""
    setting, number = int8.launch(), piece.stop - piece.start
    tiles = triton.cdiv(len(found.filled), setting["ROWS"]) * triton.cdiv(number, setting["COLUMNS"])
    append_kernel[(tiles,)](
        query.parts, query.steps, gallery.parts[piece.start :], gallery.steps[piece.start :], squares[piece],
        found.values[:, count - 1 :], found.values[:, count:], found.columns[:, count:], found.filled, found.farthest,
        len(found.filled), number, start + piece.start, found.values.stride(0), query.parts.stride(0),
        CAPACITY=CAPACITY, BASE=int8.BASE, BLOCK_D=int8.BLOCK_D, **setting,
    )  # fmt: skip


def _merge(found: Found, count: int) -> None:
    values, order = found.values.topk(count, largest=False)
    found.columns[:, :count] = found.columns.gather(1, order)
    found.values[:, :count] = values


@triton.jit
def append_kernel(
    x_ptr, x_step_ptr, y_ptr, y_step_ptr, y_square_ptr, limit_ptr, values_ptr, columns_ptr, filled_ptr, farthest_ptr,
    Q, G, FIRST, VALUES_STRIDE, SPLIT_STRIDE, CAPACITY: tl.constexpr, BASE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of queries and gallery. What is below the limit of its row, the nearest first, is appended to the row's
    places, values and columns, as far as CAPACITY goes; filled (Q,) counts on. farthest (Q,) is the largest value."""
    row, column = int8.tile_of(Q, G, ROWS, COLUMNS, GROUP)
    value = int8.values_of(
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
