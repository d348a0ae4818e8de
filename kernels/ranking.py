"""The rank of every true match, by counting:  rank(q, m) = 1 + #{valid g : (d(q, g), g) before (d(q, m), m)}.

A gallery image of the query's person is a match if its camera is another one, and else no valid image at all. Exact:
the ranks of the fp64 distances of the given features, ties by gallery index. A fast fp32 product settles every pair
outside its error bound around a match's fp64 distance; those inside are computed in fp64. No distance matrix, no sort.
Q queries, G gallery, M matches of all queries, T most matches of one query, b queries in a block.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._distances import Rows, error_bound, exact_distances, fast_distances, full_precision, scaled

QUERY_BLOCK = GALLERY_BLOCK = 1024
TALLY_ROWS, EXACT_PAIRS = 128, 4096  # looked at and decided at once


class RankCounts(NamedTuple):
    ranks: Tensor  # (M,) int64 from 1, ascending within a query; query i owns ranks[offsets[i] : offsets[i + 1]]
    offsets: Tensor  # (Q + 1,) int64
    recomputed: int  # pairs inside the error bound


class _Matches(NamedTuple):
    """The matches of a block of queries, nearest first, padded to T."""

    distances: Tensor  # (b, T) fp64, padding inf
    indices: Tensor  # (b, T) in the gallery
    counts: Tensor  # (b,)


def rank_counts(
    query: Tensor,
    gallery: Tensor,
    query_persons: Tensor,
    gallery_persons: Tensor,
    query_cameras: Tensor,
    gallery_cameras: Tensor,
    *,
    normalize: bool = False,
) -> RankCounts:
    """Ranks by squared Euclidean distance of the features (Q, D) and (G, D), brought to unit length with normalize."""
    with full_precision(query.device):
        queries, items = Rows.both(query, gallery, normalize)
        parts = []
        for start in range(0, len(query), QUERY_BLOCK):
            block = slice(start, min(start + QUERY_BLOCK, len(query)))
            q, g, match = _same_person(query_persons[block], gallery_persons, query_cameras[block], gallery_cameras)
            distances = exact_distances(queries, items, q[match] + start, g[match])
            matches = _nearest_first(distances, q[match], g[match], block.stop - start)
            parts.append(_count_features(queries, items, block, matches, q, g))
    return _joined(parts)


def rank_counts_of(
    distances: Tensor, query_persons: Tensor, gallery_persons: Tensor, query_cameras: Tensor, gallery_cameras: Tensor
) -> RankCounts:
    """The same for given distances (Q, G), such as a block of re-ranked ones."""
    if distances.shape != (len(query_persons), len(gallery_persons)) or not distances.isfinite().all():
        raise ValueError(f"rank_counts_of: distances must be finite (Q, G), got {tuple(distances.shape)}")
    q, g, match = _same_person(query_persons, gallery_persons, query_cameras, gallery_cameras)
    matches = _nearest_first(distances[q[match], g[match]].double(), q[match], g[match], len(distances))
    values = distances.index_put((q, g), torch.tensor(torch.inf, dtype=distances.dtype, device=distances.device))
    tally = torch.zeros_like(matches.indices)
    edges = _edges(matches.distances, 0, distances.dtype)
    _add_tally(tally, values, *edges, matches, lambda rows, columns: values[rows, columns].double())
    return _joined([(tally, matches, 0)])


def _same_person(
    query_persons: Tensor, gallery_persons: Tensor, query_cameras: Tensor, gallery_cameras: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (q, g) of one person, by q and then g, and whether the pair is a match (two cameras)."""
    ordered, order = gallery_persons.sort(stable=True)
    first = torch.searchsorted(ordered, query_persons)
    counts = torch.searchsorted(ordered, query_persons, right=True) - first
    q = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    g = order[torch.arange(len(q), device=q.device) + (first - counts.cumsum(0) + counts)[q]]
    return q, g, query_cameras[q] != gallery_cameras[g]


def _nearest_first(distances: Tensor, q: Tensor, g: Tensor, num_queries: int) -> _Matches:
    order = distances.argsort(stable=True)  # g ascends within a query: ties by gallery index
    order = order[q[order].argsort(stable=True)]
    counts = torch.bincount(q, minlength=num_queries)
    place = torch.arange(len(q), device=q.device) - (counts.cumsum(0) - counts)[q]
    shape = num_queries, int(counts.max()) if len(q) else 0
    nearest = distances.new_full(shape, torch.inf).index_put((q, place), distances[order])
    return _Matches(nearest, g.new_zeros(shape).index_put((q, place), g[order]), counts)


def _count_features(
    queries: Rows, items: Rows, block: slice, matches: _Matches, q: Tensor, g: Tensor
) -> tuple[Tensor, _Matches, int]:
    tally, recomputed = torch.zeros_like(matches.indices), 0
    if not tally.numel():
        return tally, matches, recomputed
    centre = matches.distances - queries.length[block, None].square()
    edges = _edges(centre, error_bound(queries, items, block)[:, None], torch.float32)
    exact = partial(exact_distances, queries, items)
    for columns, values in fast_distances(scaled(queries, block), items, GALLERY_BLOCK):
        here = (g >= columns.start) & (g < columns.stop)
        values[q[here], g[here] - columns.start] = torch.inf  # the query's own person is not counted here
        recomputed += _add_tally(tally, values, *edges, matches, exact, block.start, columns.start)
    return tally, matches, recomputed


def _edges(centre: Tensor, bound: Tensor | int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A distance left of lower (b, T) comes before the match; one right of upper (b, 1 + T) after the match before."""
    upper = (centre + bound).masked_fill(centre.isinf(), -torch.inf)
    return (centre - bound).to(dtype), F.pad(upper, (1, 0), value=-torch.inf).to(dtype)


def _add_tally(
    tally: Tensor,
    values: Tensor,
    lower: Tensor,
    upper: Tensor,
    matches: _Matches,
    exact: Callable[[Tensor, Tensor], Tensor],
    first_row: int = 0,
    first_column: int = 0,
) -> int:
    """Add to tally (b, T) how many columns of values come before each match; returns how many had to ask `exact`."""
    width, asked = lower.shape[1], 0
    for start in range(0, len(values), TALLY_ROWS):
        block = slice(start, start + TALLY_ROWS)
        value = values[block]
        near = value <= upper[block].amax(1, keepdim=True)  # the others come after every match
        if near.count_nonzero() * 8 < near.numel():  # as for a trained model: look at these only
            place = torch.full_like(value, width, dtype=torch.int32)
            r, c = near.nonzero(as_tuple=True)
            place[r, c] = (lower[r + start] <= value[r, c, None]).sum(1, dtype=torch.int32)
        else:
            place = torch.searchsorted(lower[block], value, right=True, out_int32=True)  # first it surely comes before
        r, c = (value <= upper[block].gather(1, place.long())).nonzero(as_tuple=True)
        asked += len(r)
        for rows, columns in zip(r.split(EXACT_PAIRS), c.split(EXACT_PAIRS)):
            row, column = rows + start, columns[:, None] + first_column
            distance, threshold = exact(row + first_row, columns + first_column)[:, None], matches.distances[row]
            before = (threshold < distance) | ((threshold == distance) & (matches.indices[row] < column))
            place[rows, columns] = before.sum(1, dtype=torch.int32)
        place += torch.arange(len(place), dtype=torch.int32, device=place.device)[:, None] * (width + 1)
        histogram = torch.bincount(place.flatten(), minlength=len(place) * (width + 1)).view(len(place), width + 1)
        tally[block] += histogram[:, :width].cumsum(1)
    return asked


def _joined(parts: list[tuple[Tensor, _Matches, int]]) -> RankCounts:
    ranks, counts = [], []
    for tally, matches, _ in parts:
        place = torch.arange(tally.shape[1], device=tally.device)
        ranks.append((tally + place + 1)[place < matches.counts[:, None]])
        counts.append(matches.counts)
    offsets = torch.cat([counts[0].new_zeros(1), torch.cat(counts).cumsum(0)])
    return RankCounts(torch.cat(ranks), offsets, sum(recomputed for *_, recomputed in parts))
