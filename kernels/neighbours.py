"""The k nearest gallery rows of every query, exactly:  the order of the fp64 squared distances, ties by gallery index.

Candidates come from a fast product, on a GPU that of `neighbour_tiles`, with a running top-k of k + SPARE. Where two
of them are nearer to each other than twice the error bound, fp64 distances decide. All others are at least as far as
the last candidate, less the bound: where the k-th does not clear that, the query meets all rows again that the bound
cannot exclude.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusionreid.kernels._distances import (
    UNIT,
    error_bound,
    exact_distances,
    fast_distances,
    fast_tile,
    full_precision,
    scaled,
)
from fusionreid.kernels._path import use_triton
from fusionreid.kernels._rows import Rows
from fusionreid.kernels.neighbour_tiles import Candidates, nearest_by_tiles
from fusionreid.kernels.ranking_tiles import WIDEST

BLOCK = 1024  # rows and columns of a product
AGAIN_ROWS = 64
SPARE = 8


class Neighbours(NamedTuple):
    distances: Tensor  # (Q, k) fp64, squared, ascending
    indices: Tensor  # (Q, k) int64
    farthest: Tensor  # (Q,) fp32, squared: of the farthest row, by the fast product


def nearest_neighbours(query: Tensor, gallery: Tensor, k: int, *, normalize: bool = False) -> Neighbours:
    """Features (Q, D) and (G, D), 1 <= k <= G; with normalize, at unit length."""
    _check(k, gallery)
    with full_precision(query):
        queries, items = Rows.both(query, gallery, normalize)
        found = _nearest(queries, items, slice(0, len(queries)), k)
        rows = torch.arange(len(queries), device=query.device).repeat_interleave(k)
        distances = exact_distances(queries, items, rows, found.indices.flatten()).view_as(found.indices)
    return found._replace(distances=distances)


def neighbour_lists(features: Tensor, k: int, *, rows: slice | None = None, normalize: bool = False) -> Neighbours:
    """Of each row, or of some `rows`, among all rows (N, D), itself included: half the products, as d(i, j) = d(j, i).

    The order is exact; distances that it did not need in fp64 have the error of an fp32 product.
    """
    _check(k, features)
    with full_precision(features):
        items, _ = Rows.both(features, features, normalize)
        return _nearest(items, items, rows or slice(0, len(items)), k)


def _check(k: int, gallery: Tensor) -> None:
    if not 1 <= k <= len(gallery):
        raise ValueError(f"nearest_neighbours: k must be 1 to {len(gallery)}, the size of the gallery, got {k}")


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
    tiles = use_triton(queries.features) and queries.features.shape[1] <= WIDEST
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
        query, square = scaled(queries, block), queries.length[block, None].square().float()
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
