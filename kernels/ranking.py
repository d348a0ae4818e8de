"""The rank of every true match, by counting:  rank(q, m) = 1 + #{valid g : (d(q, g), g) before (d(q, m), m)}.

A gallery image of the query's person is a match if its camera is another one, and else no valid image at all. Exact:
the ranks of the fp64 distances of the given features, ties by gallery index. A fast product, in fp32 on a CPU and in
8-bit integers on a GPU, settles every pair outside its error bound around a match's fp64 distance; on a CPU products
summed in fp64 settle nearly all of the others, and fp64 throughout the rest. No distance matrix, no sort.
Q queries, G gallery, M matches of all queries, T most matches of one query, b queries in a block, P pairs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusionreid.kernels import _int8_products as int8
from fusionreid.kernels._exact_distances import (
    Rows,
    close_bound,
    close_distances,
    error_bound,
    exact_distances,
    fast_distances,
    full_precision,
    scaled,
)
from fusionreid.kernels._path import use_triton

QUERY_BLOCK = GALLERY_BLOCK = 1024
ROWS, PAIRS = 128, 4096  # looked at and decided at once
FEW = 1 / 16  # share of near values below which they are picked out
BUCKETS = 2048
QUERIES = 2**14  # at once on a GPU: 3 D bytes each
CAPACITY = 2**22  # open pairs of a span that can be noted down on a GPU, 8 bytes each

Measure = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # rows, columns (P,) -> fp64 distances, their bound (P,)


class RankCounts(NamedTuple):
    ranks: Tensor  # (M,) int64 from 1, ascending within a query; query i owns ranks[offsets[i] : offsets[i + 1]]
    offsets: Tensor  # (Q + 1,) int64
    recomputed: int  # pairs inside the error bound


class Matches(NamedTuple):
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
    """Rank every query's matches by squared Euclidean distance of the features (Q, D) and (G, D).

    Persons and cameras are integers (Q,) and (G,) on the device of the queries; with normalize, features are brought to
    unit length. A gallery in host memory may be ranked for queries on a GPU. ValueError if shapes, types or devices do
    not fit, or features are not finite.
    """
    ids = query_persons, gallery_persons, query_cameras, gallery_cameras
    _check_ids("rank_counts", ids, len(query), len(gallery), query.device)
    with full_precision(query):
        queries, items = Rows.both(query, gallery, normalize)
        parts = []
        order = _most_first(query_persons, gallery_persons)  # the padding to T costs time
        tiles = use_triton(queries.features) and queries.features.shape[1] <= int8.WIDEST
        for rows in order.split(QUERIES if tiles else QUERY_BLOCK):
            q, g, match = _same_person(query_persons[rows], gallery_persons, query_cameras[rows], gallery_cameras)
            distances = exact_distances(queries, items, rows[q[match]], g[match])
            matches = _nearest_first(distances, q[match], g[match], len(rows))
            persons = query_persons[rows], gallery_persons
            counted = _tally_features(queries, items, rows, *matches, *persons) if tiles else None
            tally, recomputed = counted or _count_features(queries, items, rows, matches, q, g)
            parts.append((tally, matches, recomputed))
    return _joined(parts, order)


def rank_counts_of(
    distances: Tensor, query_persons: Tensor, gallery_persons: Tensor, query_cameras: Tensor, gallery_cameras: Tensor
) -> RankCounts:
    """Rank every query's matches by given distances (Q, G), such as a block of re-ranked ones; see `rank_counts`."""
    if distances.ndim != 2 or not distances.is_floating_point():
        raise ValueError(
            f"rank_counts_of: distances must be floating (Q, G), got {tuple(distances.shape)} {distances.dtype}"
        )
    ids = query_persons, gallery_persons, query_cameras, gallery_cameras
    _check_ids("rank_counts_of", ids, len(distances), distances.shape[1], distances.device)
    if not distances.isfinite().all():
        bad = (~distances.isfinite()).any(1).nonzero().flatten().tolist()
        raise ValueError(f"rank_counts_of: distances must be finite, those of {len(bad)} queries are not: {bad[:5]}")
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


def _check_ids(op: str, given: tuple[Tensor, ...], num_query: int, num_gallery: int, device: torch.device) -> None:
    names = "query_persons", "gallery_persons", "query_cameras", "gallery_cameras"
    for name, ids, count in zip(names, given, (num_query, num_gallery) * 2, strict=True):
        if ids.shape != (count,) or ids.is_floating_point() or ids.device != device:
            raise ValueError(
                f"{op}: {name} must hold one integer for each of {count} rows, on {device}, "
                f"got {tuple(ids.shape)} {ids.dtype} on {ids.device}"
            )


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
    for start, part in items.spans(int8.SPAN):
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


class Counter:
    """Counts in a few passes over the values, whatever T.

    A row's range from its first match to its last is cut into buckets; rounded as it is, x -> bucket(x) is monotone, so
    what lies in different buckets has the order of the buckets. Values are held in their buckets, but for the buckets
    that the band around a match reaches into: those are compared one by one, and measured anew if inside the band.
    """

    def __init__(self, matches: Matches, centre: Tensor, bound: Tensor | float, dtype: torch.dtype) -> None:
        """A value below centre - bound (b, T) comes before the match, one above centre + bound after it; ascending."""
        self.matches, padding = matches, matches.distances.isinf()
        self.lower, self.upper = ((centre + side).masked_fill(padding, torch.inf).to(dtype) for side in (-bound, bound))
        self.looked_at = torch.zeros_like(matches.indices)  # (b, T): of those measured, how many come before a match
        self.ahead_of = matches.indices.new_zeros(len(padding), padding.shape[1] + 1)  # and of the others, by the first
        self.last = self.upper.masked_fill(padding, -torch.inf).amax(1, keepdim=True)
        self.first = self.lower[:, :1].masked_fill(padding[:, :1], 0).to(torch.promote_types(dtype, torch.float32))
        span = (self.last - self.first).clamp(1e-30, torch.finfo(self.first.dtype).max)
        self.per_unit = (BUCKETS - 3) / span
        self.place, real = self._bucket(self.lower), (~padding).int()
        edges = real.new_zeros(len(real), BUCKETS + 1).scatter_add_(1, self.place, real)
        edges.scatter_add_(1, self._bucket(self.upper) + 1, -real)
        self.reached = edges.cumsum(1)[:, :BUCKETS] > 0  # (b, BUCKETS)
        self.held = real.new_zeros(len(real), BUCKETS)

    def _bucket(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        place = (values - self.first[rows]).mul_(self.per_unit[rows]).add_(1)  # 0: before all, BUCKETS - 1: after all
        return place.clamp_(0, BUCKETS - 1).long()

    def add(self, values: Tensor, measures: Sequence[Measure], first_column: int = 0) -> int:
        """Values (b, w) of consecutive columns; how many had to be measured."""
        asked = 0
        for start in range(0, len(values), ROWS):
            own = slice(start, start + ROWS)
            value = values[own]
            single = value <= self.last[own]  # the others come after every match
            if single.count_nonzero() > FEW * single.numel():  # not as for a trained model
                place = self._bucket(value, own)
                self.held[own].scatter_add_(1, place, self.held.new_ones(1, 1).expand_as(place))
                single = self.reached[own].gather(1, place)
            r, c = single.nonzero(as_tuple=True)
            for rows, columns in zip((r + start).split(PAIRS), c.split(PAIRS)):
                asked += self._look_at(values, rows, columns, measures, first_column)
        return asked

    def _look_at(
        self, values: Tensor, rows: Tensor, columns: Tensor, measures: Sequence[Measure], first_column: int
    ) -> int:
        """Decide the pairs (P,) by their values, then by one measure after the other; the last one is exact."""
        value, width = values[rows, columns, None], self.lower.shape[1]
        after = torch.searchsorted(self.upper[rows], value)  # (P, 1): so many matches it comes after, surely
        before = torch.searchsorted(self.lower[rows], value, right=True)  # surely before this one and all behind it
        at = rows * (width + 1) + before[:, 0]
        self.ahead_of.view(-1).index_add_(0, at, torch.ones_like(at))
        some = (after < before).nonzero()[:, 0]
        match = torch.arange(width, device=rows.device)
        is_open = (match >= after[some]) & (match < before[some])  # (P, T)
        rows, columns = rows[some], columns[some] + first_column
        asked = len(rows)
        for measure in measures if asked else ():
            distance, bound = (t[:, None] for t in measure(rows, columns))
            threshold = self.matches.distances[rows]
            before = distance < threshold - bound
            if measure is measures[-1]:
                before |= (distance == threshold) & (columns[:, None] < self.matches.indices[rows])
            self.looked_at.index_add_(0, rows, (before & is_open).long())
            is_open = is_open & (threshold - bound <= distance) & (distance <= threshold + bound)
            some = is_open.any(1)
            rows, columns, is_open = rows[some], columns[some], is_open[some]
            if not len(rows):
                break
        return asked

    def tally(self) -> Tensor:
        """How many of all values come before each match (b, T)."""
        held = self.held.masked_fill(self.reached, 0).cumsum(1).gather(1, self.place)
        return self.looked_at + self.ahead_of.cumsum(1)[:, :-1] + held


def _tally_features(
    queries: Rows, items: Rows, block: Tensor, distances: Tensor, indices: Tensor, counts: Tensor,
    query_persons: Tensor, gallery_persons: Tensor,
) -> tuple[Tensor, int] | None:  # fmt: skip
    """For matches (b, T) of a block of queries, nearest first: how many images of other persons come before each, and
    how many pairs took fp64. None where too many would."""
    place = counts - 1 - torch.arange(distances.shape[1], device=counts.device)[:, None]  # (T, b): farthest first
    exists, place = place >= 0, place.clamp_min(0)
    thresholds, first = distances.T.gather(0, place), indices.T.gather(0, place)
    centre = thresholds - queries.length[block].square()
    persons = torch.cat([query_persons, gallery_persons]).unique(return_inverse=True)[1].int()
    mine, theirs = persons[: len(block)], persons[len(block) :]
    tally = torch.zeros(place.shape, dtype=torch.int32, device=counts.device)
    noted_pairs = torch.empty(2, CAPACITY, dtype=torch.int32, device=counts.device)
    recomputed = 0
    query = int8.split_rows(queries, block)
    for start, part in items.spans(int8.SPAN) if tally.numel() else ():
        gallery, noted = int8.split_rows(part, torch.arange(len(part), device=counts.device)), counts.new_zeros(1)
        bound = int8.error_bound(query, gallery, queries.length[block], part.length.max(), part.features.shape[1])
        edges = tuple((centre + side).where(exists, -torch.inf).float() for side in (-bound, bound))
        others, squares = theirs[start : start + len(part)], part.length.square().float()
        count_span(query, gallery, (mine, others), squares, edges, tally, noted, noted_pairs)
        number = int(noted)
        if number > CAPACITY:
            return None
        match, column = noted_pairs[:, :number].long()
        pairs, pair = (match % len(block) * len(part) + column).unique(return_inverse=True)  # once for all matches
        distance = exact_distances(queries, part, block[pairs // len(part)], pairs % len(part))[pair]
        threshold = thresholds.flatten()[match]
        before = (distance < threshold) | ((distance == threshold) & (start + column < first.flatten()[match]))
        tally.view(-1).index_add_(0, match, before.int())
        recomputed += len(pairs)
    return tally.gather(0, place).T.long(), recomputed


def count_span(
    query: int8.Split,
    gallery: int8.Split,
    persons: tuple[Tensor, Tensor],
    squares: Tensor,
    edges: tuple[Tensor, Tensor],
    tally: Tensor,
    noted: Tensor,
    pairs: Tensor,
) -> None:
    """Of a span of the gallery: how many come surely before each match is added to tally (T, Q).

    persons (Q,) and (G,) int32, squares (G,) fp32, edges (T, Q) fp32 each; noted (1,): how many pairs are open;
    pairs (2, capacity) int32: their match and column.
    """
    setting = int8.launch()
    tiles = triton.cdiv(len(persons[0]), setting["ROWS"]) * triton.cdiv(len(persons[1]), setting["COLUMNS"])
    count_kernel[(tiles,)](
        query.parts, query.steps, persons[0], gallery.parts, gallery.steps, squares, persons[1], *edges, tally,
        noted, pairs, len(persons[0]), len(persons[1]), len(tally),
        query.parts.stride(0), CAPACITY=pairs.shape[1], BASE=int8.BASE, BLOCK_D=int8.BLOCK_D, **setting,
    )  # fmt: skip


@triton.jit
def count_kernel(
    x_ptr, x_step_ptr, x_person_ptr, y_ptr, y_step_ptr, y_square_ptr, y_person_ptr, lower_ptr, upper_ptr, tally_ptr,
    noted_ptr, pairs_ptr, Q, G, T, SPLIT_STRIDE, CAPACITY: tl.constexpr, BASE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of queries and gallery. Of every match, farthest first: tally (T, Q) counts the columns surely before it,
    and the pairs that are left open are noted down: the match as t * Q + query, CAPACITY
    further on the column."""
    row, column = int8.tile_of(Q, G, ROWS, COLUMNS, GROUP)
    value = int8.values_of(
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
