"""The k nearest gallery rows of every query, exactly:  the order of the fp64 squared distances, ties by gallery index.

Candidates come from a fast fp32 product with a running top-k of k + SPARE; their distances are computed in fp64. All
others are at least as far as the last candidate, less the error bound: where the k-th distance does not clear that,
the query is done again in fp64 against the whole gallery.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels._distances import Rows, error_bound, exact_distances, fast_distances, full_precision, scaled

QUERY_BLOCK, GALLERY_BLOCK = 1024, 2048
SPARE = 8


class Neighbours(NamedTuple):
    distances: Tensor  # (Q, k) fp64, squared, ascending
    indices: Tensor  # (Q, k) int64
    farthest: Tensor  # (Q,) fp64, squared: the farthest row by the fast product, its distance in fp64


def nearest_neighbours(query: Tensor, gallery: Tensor, k: int, *, normalize: bool = False) -> Neighbours:
    """Features (Q, D) and (G, D), 1 <= k <= G; with normalize, at unit length."""
    if not 1 <= k <= len(gallery):
        raise ValueError(f"nearest_neighbours: k must be 1 to {len(gallery)}, the size of the gallery, got {k}")
    with full_precision(query.device):
        queries, items = Rows.both(query, gallery, normalize)
        starts = range(0, len(query), QUERY_BLOCK)
        blocks = [_block(queries, items, slice(start, min(start + QUERY_BLOCK, len(query))), k) for start in starts]
    return Neighbours(*(torch.cat(columns) for columns in zip(*blocks)))


def _block(queries: Rows, items: Rows, block: slice, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values, indices, farthest = _candidates(queries, items, block, min(k + SPARE, len(items)))
    rows = torch.arange(block.start, block.stop, device=values.device)
    q = rows[:, None].expand_as(indices)
    indices = indices.sort(1).values
    distances = exact_distances(queries, items, q.flatten(), indices.flatten()).view(indices.shape)
    distances, order = distances.sort(dim=1, stable=True)
    indices = indices.gather(1, order)
    if values.shape[1] < len(items):
        reach = values[:, -1] + queries.length[block].square() - error_bound(queries, items, block)
        for row in (distances[:, k - 1] >= reach).nonzero().flatten().tolist():
            every = torch.arange(len(items), device=values.device)
            exact = exact_distances(queries, items, rows[row].expand_as(every), every).sort(stable=True)
            distances[row], indices[row] = exact.values[: values.shape[1]], exact.indices[: values.shape[1]]
    return distances[:, :k], indices[:, :k], exact_distances(queries, items, rows, farthest)


def _candidates(queries: Rows, items: Rows, block: slice, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` nearest (b, count) by the fast product, ascending, and the farthest (b,)."""
    query = scaled(queries, block)
    best = query.new_empty(len(query), 0)
    indices = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    largest, farthest = query.new_full((len(query),), -torch.inf), indices.new_zeros(len(query))
    for columns, values in fast_distances(query, items, GALLERY_BLOCK):
        peak = values.max(1)
        farthest = torch.where(peak.values > largest, peak.indices + columns.start, farthest)
        largest = torch.maximum(peak.values, largest)
        near = values.topk(min(count, values.shape[1]), largest=False)
        both, places = torch.cat([best, near.values], 1), torch.cat([indices, near.indices + columns.start], 1)
        best, order = both.topk(min(count, both.shape[1]), largest=False)
        indices = places.gather(1, order)
    return best, indices, farthest
