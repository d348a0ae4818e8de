"""The rank of every true match, by counting:  rank(q, m) = 1 + #{valid g : (d(q, g), g) before (d(q, m), m)}.

A gallery image of the query's person is a match if its camera is another one, and else no valid image at all. Exact:
the ranks of the fp64 distances of the given features, ties by gallery index. A fast fp32 product settles every pair
outside its error bound around a match's fp64 distance, products summed in fp64 settle nearly all of the others, and
fp64 throughout the rest. No distance matrix, no sort.
Q queries, G gallery, M matches of all queries, T most matches of one query, b queries in a block, P pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusionreid.kernels import ranking_tiles
from fusionreid.kernels._counting import Counter, Matches, Measure
from fusionreid.kernels._distances import (
    close_bound,
    close_distances,
    error_bound,
    exact_distances,
    fast_distances,
    full_precision,
    scaled,
)
from fusionreid.kernels._path import use_triton
from fusionreid.kernels._rows import Rows

QUERY_BLOCK = GALLERY_BLOCK = 1024


class RankCounts(NamedTuple):
    ranks: Tensor  # (M,) int64 from 1, ascending within a query; query i owns ranks[offsets[i] : offsets[i + 1]]
    offsets: Tensor  # (Q + 1,) int64
    recomputed: int  # pairs inside the error bound


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
    with full_precision(query):
        queries, items = Rows.both(query, gallery, normalize)
        parts = []
        order = _most_first(query_persons, gallery_persons)  # the padding to T costs time
        tiles = use_triton(queries.features) and queries.features.shape[1] <= ranking_tiles.WIDEST
        for rows in order.split(ranking_tiles.QUERIES if tiles else QUERY_BLOCK):
            q, g, match = _same_person(query_persons[rows], gallery_persons, query_cameras[rows], gallery_cameras)
            distances = exact_distances(queries, items, rows[q[match]], g[match])
            matches = _nearest_first(distances, q[match], g[match], len(rows))
            persons = query_persons[rows], gallery_persons
            counted = ranking_tiles.tally_features(queries, items, rows, *matches, *persons) if tiles else None
            tally, recomputed = counted or _count_features(queries, items, rows, matches, q, g)
            parts.append((tally, matches, recomputed))
    return _joined(parts, order)


def rank_counts_of(
    distances: Tensor, query_persons: Tensor, gallery_persons: Tensor, query_cameras: Tensor, gallery_cameras: Tensor
) -> RankCounts:
    """The same for given distances (Q, G), such as a block of re-ranked ones."""
    if distances.shape != (len(query_persons), len(gallery_persons)) or not distances.isfinite().all():
        raise ValueError(f"rank_counts_of: distances must be finite (Q, G), got {tuple(distances.shape)}")
    q, g, match = _same_person(query_persons, gallery_persons, query_cameras, gallery_cameras)
    matches = _nearest_first(distances[q[match], g[match]].double(), q[match], g[match], len(distances))
    values = distances.index_put((q, g), torch.tensor(torch.inf, dtype=distances.dtype, device=distances.device))
    if not matches.indices.numel():
        return _joined([(matches.indices, matches, 0)], torch.arange(len(distances), device=distances.device))
    counter = Counter(matches, matches.distances, 0.0, distances.dtype)

    def given(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        value = values[rows, columns].double()
        return value, torch.zeros_like(value)

    counter.add(values, [given])
    return _joined([(counter.tally(), matches, 0)], torch.arange(len(distances), device=distances.device))


def _most_first(query_persons: Tensor, gallery_persons: Tensor) -> Tensor:
    """The queries (Q,) in the order of how many gallery images show their person."""
    ordered = gallery_persons.sort().values
    counts = torch.searchsorted(ordered, query_persons, right=True) - torch.searchsorted(ordered, query_persons)
    return counts.argsort(stable=True, descending=True)


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


def _nearest_first(distances: Tensor, q: Tensor, g: Tensor, num_queries: int) -> Matches:
    order = distances.argsort(stable=True)  # g ascends within a query: ties by gallery index
    order = order[q[order].argsort(stable=True)]
    counts = torch.bincount(q, minlength=num_queries)
    place = torch.arange(len(q), device=q.device) - (counts.cumsum(0) - counts)[q]
    shape = num_queries, int(counts.max()) if len(q) else 0
    nearest = distances.new_full(shape, torch.inf).index_put((q, place), distances[order])
    return Matches(nearest, g.new_zeros(shape).index_put((q, place), g[order]), counts)


def _count_features(
    queries: Rows, items: Rows, block: Tensor, matches: Matches, q: Tensor, g: Tensor
) -> tuple[Tensor, int]:
    if not matches.indices.numel():
        return torch.zeros_like(matches.indices), 0
    centre = matches.distances - queries.length[block, None].square()
    counter = Counter(matches, centre, error_bound(queries, items, block)[:, None], torch.float32)
    query, recomputed = scaled(queries, block), 0
    for start, part in items.spans(ranking_tiles.SPAN):
        measures = _measures(queries, part, block, close_bound(queries, items, block), start)
        for columns, values in fast_distances(query, part, GALLERY_BLOCK):
            first = start + columns.start
            here = (g >= first) & (g < start + columns.stop)
            values[q[here], g[here] - first] = torch.inf  # the query's own person is not counted here
            recomputed += counter.add(values, measures, first)
    return counter.tally(), recomputed


def _measures(queries: Rows, part: Rows, block: Tensor, bound: Tensor, start: int) -> list[Measure]:
    """Of a block of queries and of columns that lie in a part of the gallery."""

    def close(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return close_distances(queries, part, block[rows], columns - start), bound[rows]

    def exact(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return exact_distances(queries, part, block[rows], columns - start), torch.zeros_like(bound[rows])

    return [close, exact]


def _joined(parts: list[tuple[Tensor, Matches, int]], order: Tensor) -> RankCounts:
    """The parts' queries, one after the other, are `order` (Q,): brought back into theirs."""
    ranks, counts = [], []
    for tally, matches, _ in parts:
        place = torch.arange(tally.shape[1], device=tally.device)
        ranks.append((tally + place + 1)[place < matches.counts[:, None]])
        counts.append(matches.counts)
    given = torch.cat(counts)
    start = given.cumsum(0) - given
    number = torch.empty_like(given).index_put((order,), given)
    offsets = torch.cat([number.new_zeros(1), number.cumsum(0)])
    place = torch.arange(int(offsets[-1]), device=number.device)
    shift = torch.empty_like(start).index_put((order,), start) - offsets[:-1]
    ordered = torch.cat(ranks)[place + shift.repeat_interleave(number)]
    return RankCounts(ordered, offsets, sum(recomputed for *_, recomputed in parts))
