"""k-reciprocal re-ranking, exact, in memory that grows with the number of images and not with its square.

distance = (1 - weight) Jaccard(q, g) + weight |q - g|^2 / max_x |q - x|^2. An image is a sparse row V: weights
exp(-scaled distance) of its expanded k1-reciprocal neighbours, then the mean of the rows of its k2 nearest neighbours.
Source: Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, arXiv:1701.08398. Equal to the
published code with double in place of its half precision. N = Q + G images, queries first.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusionreid.engine.evaluation.retrieval import Gather, Metric, rows_of_share
from fusionreid.kernels import full_precision, neighbour_lists

BLOCK_ROWS = 256
PAIR_ELEMENTS = 2**18  # feature values compared at once
DISTANCES = 2**24  # of a block of queries
PAIRS = 2**24  # of entries that meet at once on a GPU


def k_reciprocal(
    query: Tensor, gallery: Tensor, k1: int = 20, k2: int = 6, weight: float = 0.3, *, metric: Metric = "cosine"
) -> Tensor:
    """Re-ranked distances (Q, G) of features (Q, D) and (G, D). The published evaluator uses k1 50, k2 15."""
    features = torch.cat([query, gallery])
    return torch.cat(list(rerank_blocks(features, len(query), k1, k2, weight, metric=metric)))


@torch.no_grad()
def rerank_blocks(
    features: Tensor,
    num_query: int,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    *,
    metric: Metric = "cosine",
    share: tuple[int, int] = (0, 1),
    gather: Gather = lambda rows: rows,
) -> Iterator[Tensor]:
    """Yield re-ranked distances of features (N, D), queries first, as rows (b, G) for `retrieval.rank_blocks`.

    share (i, n): process i of n does its share of every stage, `gather` joins the shares in between, and the rows are
    those of the i-th share of the queries.
    """
    if k1 < 1 or k2 < 1 or not 0 <= weight <= 1:
        raise ValueError(f"re-ranking needs k1 and k2 of 1 or more and a weight in [0, 1], got {k1}, {k2}, {weight}")
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if metric == "cosine":
        features = F.normalize(features)
    num_images, mine = len(features), rows_of_share(len(features), share)
    near = neighbour_lists(features, min(max(k1 + 1, k2), num_images), rows=mine)
    farthest = gather(near.farthest).to(features).clamp_min(torch.finfo(features.dtype).tiny)
    neighbours = gather(near.indices)
    known = near.distances[:, : k1 + 1].to(features)
    row, column, square = _reciprocal_sets(neighbours[:, : k1 + 1], known, round(k1 / 2) + 1, mine)
    new = square.isnan().nonzero().flatten()
    square[new] = _squared_distances(features, row[new] + mine.start, column[new])
    value = (-square / farthest[mine][row]).exp()
    value /= value.new_zeros(len(known)).index_add_(0, row, value)[row]
    rows = _Sparse.of(row, column, value, len(known)).gathered(gather)
    rows = _expanded(rows, neighbours[mine, :k2]).gathered(gather)
    lists = rows.transposed(slice(num_query, num_images), num_images)
    squares = features.norm(dim=1).square()
    queries = rows_of_share(num_query, share)
    size = max(1, DISTANCES // (num_images - num_query))
    for start in range(queries.start, queries.stop, size):
        block = slice(start, min(start + size, queries.stop))
        with full_precision(features):
            distance = torch.addmm(squares[num_query:], features[block], features[num_query:].T, alpha=-2)
        distance.add_(squares[block, None]).clamp_min_(0).mul_(weight / farthest[block, None])
        overlap = distance.new_zeros(distance.numel())
        meet = _meet_all_at_once if overlap.is_cuda else _meet_by_column
        meet(rows.transposed(block, num_images), lists, num_images - num_query, overlap)
        overlap = overlap.view_as(distance)
        yield distance.add_(overlap.div_(2 - overlap).neg_().add_(1), alpha=1 - weight)  # 1 - o / (2 - o): Jaccard


def _reciprocal_sets(
    neighbours: Tensor, distances: Tensor, num_half: int, mine: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries (row of `mine`, column), sorted, and their squared distances, NaN where no neighbour of the row.

    Each image's k-reciprocal set, grown by its members' half-size sets that lie in it by more than 2/3.
    """
    half = neighbours[:, :num_half]
    mutual, mutual_half = _is_mutual(neighbours, mine), _is_mutual(half, slice(0, len(half)))
    num_images, own_neighbours, entries, squares = len(neighbours), neighbours[mine], [], []
    size = min(BLOCK_ROWS, len(own_neighbours)), num_images + 1  # last column: nobody
    all_members, all_known = neighbours.new_empty(size, dtype=torch.bool), distances.new_empty(size)
    for start in range(0, len(own_neighbours), BLOCK_ROWS):
        near, own = own_neighbours[start : start + BLOCK_ROWS], mutual[start : start + BLOCK_ROWS]  # (b, K)
        members, known = all_members[: len(near)].zero_(), all_known[: len(near)].fill_(torch.nan)
        members.scatter_(1, near.where(own, num_images), True)
        theirs, in_theirs = half[near], mutual_half[near]  # (b, K, half)
        shared = members.gather(1, theirs.flatten(1)).view_as(theirs) & in_theirs
        accepted = own & (3 * shared.sum(2) > 2 * in_theirs.sum(2))
        members.scatter_(1, theirs.where(in_theirs & accepted[..., None], num_images).flatten(1), True)
        entry = members[:, :num_images].nonzero()
        known.scatter_(1, near, distances[start : start + BLOCK_ROWS])
        squares.append(known[entry[:, 0], entry[:, 1]])
        entries.append(entry + torch.tensor([start, 0], device=near.device))
    row, column = torch.cat([near.new_zeros(0, 2), *entries]).unbind(1) if entries else neighbours.new_zeros(2, 0)
    return row, column, torch.cat([distances.new_zeros(0), *squares])


def _is_mutual(neighbours: Tensor, rows: slice) -> Tensor:
    """Whether each neighbour of these rows has the image among its own neighbours (b, K)."""
    images = torch.arange(rows.start, rows.stop, device=neighbours.device)[:, None, None]
    blocks = zip(neighbours[rows].split(BLOCK_ROWS), images.split(BLOCK_ROWS))
    return torch.cat([(neighbours[near] == image).any(2) for near, image in blocks])


def _squared_distances(features: Tensor, row: Tensor, column: Tensor) -> Tensor:
    size = max(1, PAIR_ELEMENTS // features.shape[1])
    pairs = zip(row.split(size), column.split(size))
    return torch.cat([(features[r] - features[c]).square_().sum(1) for r, c in pairs])


def _expanded(rows: "_Sparse", nearest: Tensor) -> "_Sparse":
    """The mean of the rows of the nearest images, for each row of nearest (b, k2)."""
    num_images, k2 = len(rows.length), nearest.shape[1]
    lengths, columns, values = [rows.length[:0]], [rows.column[:0]], [rows.value[:0]]
    for near in nearest.split(BLOCK_ROWS):
        owner, place = _spread(rows.start[near.flatten()], rows.length[near.flatten()])
        dense = rows.value.new_zeros(len(near), num_images)
        dense.view(-1).index_add_(0, owner // k2 * num_images + rows.column[place], rows.value[place] / k2)
        row, column = dense.nonzero(as_tuple=True)
        lengths.append(torch.bincount(row, minlength=len(near)))
        columns.append(column.int())
        values.append(dense[row, column])
    length = torch.cat(lengths)
    return _Sparse(length.cumsum(0) - length, length, torch.cat(columns), torch.cat(values))


class _Sparse(NamedTuple):
    """A matrix by its entries, in the order of its rows."""

    start: Tensor  # of each row, in the entries
    length: Tensor  # of each row
    column: Tensor  # int32: at the size of a data set these are most of the memory
    value: Tensor

    @classmethod
    def of(cls, row: Tensor, column: Tensor, value: Tensor, num_rows: int) -> "_Sparse":
        """Matrix of entries (row, column, value), each (E,), in the order of their rows."""
        length = torch.bincount(row, minlength=num_rows)
        return cls(length.cumsum(0) - length, length, column.int(), value)

    def gathered(self, gather: Gather) -> "_Sparse":
        """Join the rows of all processes."""
        length = gather(self.length)
        return _Sparse(length.cumsum(0) - length, length, gather(self.column), gather(self.value))

    def transposed(self, rows: slice, num_columns: int) -> "_Sparse":
        """Transpose some rows, counted from the first of them: for each column the rows that have an entry in it."""
        length = self.length[rows]
        first = int(self.start[rows.start]) if len(length) else 0
        mine = slice(first, first + int(length.sum()))
        row = torch.arange(len(length), dtype=torch.int32, device=length.device).repeat_interleave(length)
        column, order = self.column[mine].sort(stable=True)
        return _Sparse.of(column, row[order], self.value[mine][order], num_columns)


def _meet_by_column(queries: _Sparse, gallery: _Sparse, num_gallery: int, overlap: Tensor) -> None:
    """Add sum_x min(V[q, x], V[g, x]) to overlap (b * G,), of two transposed matrices.

    In each column x, all queries meet all gallery.
    """
    columns = zip(
        (queries.column.long() * num_gallery)[:, None].split(queries.length.tolist()),
        queries.value[:, None].split(queries.length.tolist()),
        gallery.column.split(gallery.length.tolist()),
        gallery.value.split(gallery.length.tolist()),
    )
    for q, weight, g, other in columns:
        if len(q) and len(g):
            overlap.scatter_add_(0, (q + g).view(-1), torch.minimum(weight, other).view(-1))


def _meet_all_at_once(queries: _Sparse, gallery: _Sparse, num_gallery: int, overlap: Tensor) -> None:
    """Add what `_meet_by_column` adds, without a loop over columns."""
    pairs = queries.length * gallery.length
    ends = pairs.cumsum(0)
    total = int(ends[-1])
    for first in range(0, total, PAIRS):
        pair = torch.arange(first, min(first + PAIRS, total), device=overlap.device)
        column = torch.searchsorted(ends, pair, right=True)
        pair -= (ends - pairs)[column]
        q = queries.start[column] + pair // gallery.length[column]
        g = gallery.start[column] + pair % gallery.length[column]
        place = queries.column[q].long() * num_gallery + gallery.column[g]
        overlap.scatter_add_(0, place, torch.minimum(queries.value[q], gallery.value[g]))


def _spread(start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """All places start[i] + 0 .. length[i] - 1, and the i that each belongs to."""
    owner = torch.arange(len(start), device=start.device).repeat_interleave(length)
    place = torch.arange(len(owner), device=start.device) + (start - length.cumsum(0) + length)[owner]
    return owner, place
