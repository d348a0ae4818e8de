"""The k nearest gallery rows of every query, exactly:  the order of the fp64 squared distances, ties by gallery index.

Candidates come from a fast fp32 product with a running top-k of k + SPARE. Where two of them are nearer to each other
than twice the error bound, fp64 distances decide. All others are at least as far as the last candidate, less the bound:
where the k-th does not clear that, the query meets all rows again that the bound cannot exclude.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._distances import (
    UNIT,
    Rows,
    error_bound,
    exact_distances,
    fast_distances,
    fast_tile,
    full_precision,
    scaled,
)

BLOCK = 1024  # rows and columns of a product
AGAIN_ROWS = 64
SPARE = 8


class Neighbours(NamedTuple):
    distances: Tensor  # (Q, k) fp64, squared, ascending
    indices: Tensor  # (Q, k) int64
    farthest: Tensor  # (Q,) fp64, squared: the farthest row by the fast product, its distance in fp64


def nearest_neighbours(query: Tensor, gallery: Tensor, k: int, *, normalize: bool = False) -> Neighbours:
    """Features (Q, D) and (G, D), 1 <= k <= G; with normalize, at unit length."""
    _check(k, gallery)
    with full_precision(query.device):
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
    with full_precision(features.device):
        items, _ = Rows.both(features, features, normalize)
        return _nearest(items, items, rows or slice(0, len(items)), k)


def _check(k: int, gallery: Tensor) -> None:
    if not 1 <= k <= len(gallery):
        raise ValueError(f"nearest_neighbours: k must be 1 to {len(gallery)}, the size of the gallery, got {k}")


class _Candidates:
    """The nearest so far and the farthest of some rows, by the fast product."""

    def __init__(self, num_rows: int, count: int, like: Tensor) -> None:
        self.values = like.new_full((num_rows, count), torch.inf, dtype=torch.float32)  # ascending
        self.indices = torch.zeros(num_rows, count, dtype=torch.int64, device=like.device)
        self.largest = like.new_full((num_rows,), -torch.inf, dtype=torch.float32)
        self.farthest = torch.zeros(num_rows, dtype=torch.int64, device=like.device)

    def add(self, rows: slice, values: Tensor, first_column: int) -> None:
        """Distances (b, w) of these rows to consecutive columns."""
        peak = values.max(1)
        self.farthest[rows] = torch.where(
            peak.values > self.largest[rows], peak.indices + first_column, self.farthest[rows]
        )
        self.largest[rows] = torch.maximum(peak.values, self.largest[rows])
        count = self.values.shape[1]
        near = values.topk(min(count, values.shape[1]), largest=False)
        both = torch.cat([self.values[rows], near.values], 1)
        places = torch.cat([self.indices[rows], near.indices + first_column], 1)
        self.values[rows], order = both.topk(count, largest=False)
        self.indices[rows] = places.gather(1, order)


def _nearest(queries: Rows, items: Rows, rows: slice, k: int) -> Neighbours:
    candidates = _Candidates(rows.stop - rows.start, min(k + SPARE, len(items)), queries.features)
    symmetric = queries is items
    inner = _blocks(rows.start, rows.stop)
    outer = [*_blocks(0, rows.start), *inner, *_blocks(rows.stop, len(items))] if symmetric else _blocks(0, len(items))
    memory = candidates.values.new_empty(3, BLOCK * BLOCK)
    for block in inner:
        query, square = scaled(queries, block), queries.length[block, None].square().float()
        own = slice(block.start - rows.start, block.stop - rows.start)
        for columns in outer:
            mirrored = symmetric and rows.start <= columns.start < rows.stop
            if mirrored and columns.start < block.start:
                continue  # its mirror image has been seen
            values = fast_tile(query, items, columns, memory).add_(square)
            candidates.add(own, values, columns.start)
            if mirrored and columns.start > block.start:
                theirs = slice(columns.start - rows.start, columns.stop - rows.start)
                candidates.add(theirs, values.T.contiguous(), block.start)
    parts = [(candidates.values.new_empty(0, k, dtype=torch.float64), candidates.indices.new_empty(0, k))]
    parts += [_ordered(queries, items, block, rows.start, candidates, k) for block in inner]
    distances, indices = (torch.cat(columns) for columns in zip(*parts))
    index = torch.arange(rows.start, rows.stop, device=indices.device)
    return Neighbours(distances, indices, exact_distances(queries, items, index, candidates.farthest))


def _blocks(start: int, stop: int) -> list[slice]:
    return [slice(first, min(first + BLOCK, stop)) for first in range(start, stop, BLOCK)]


def _ordered(
    queries: Rows, items: Rows, block: slice, first_row: int, candidates: _Candidates, k: int
) -> tuple[Tensor, Tensor]:
    """Distances and indices (b, k) in exact order."""
    own = slice(block.start - first_row, block.stop - first_row)
    fast, indices = candidates.values[own], candidates.indices[own]
    rows = torch.arange(block.start, block.stop, device=fast.device)
    longest = torch.maximum(queries.length[block], items.length.max())
    bound = error_bound(queries, items, block) + 6 * UNIT * longest.square()  # |q|^2 and the sum with it are rounded
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
            limit = most[part] + bound[part] - queries.length[rows[part]].square()
            distances[part], indices[part] = _again(queries, items, rows[part], limit.float(), k)
    return distances, indices


def _again(queries: Rows, items: Rows, rows: Tensor, limit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and indices (b, k) in fp64, among all items that the fast product puts within the limit (b,)."""
    found = []
    for columns, values in fast_distances(scaled(queries, rows), items, BLOCK):
        r, c = (values <= limit[:, None]).nonzero(as_tuple=True)
        found.append((r, c + columns.start))
    r, c = (torch.cat(parts) for parts in zip(*found))
    distances = exact_distances(queries, items, rows[r], c)
    order = distances.argsort(stable=True)  # c ascends within a row: ties by gallery index
    order = order[r[order].argsort(stable=True)]
    counts = torch.bincount(r, minlength=len(rows))
    place = order[(counts.cumsum(0) - counts)[:, None] + torch.arange(k, device=order.device)]
    return distances[place], c[place]
