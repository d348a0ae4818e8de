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

from engine.retrieval import Metric
from kernels import nearest_neighbours

BLOCK_ROWS = 256
PAIR_ELEMENTS = 2**18  # feature values compared at once
OVERLAPS = 2**18  # pairs of sparse entries met at once


def k_reciprocal(
    query: Tensor, gallery: Tensor, k1: int = 20, k2: int = 6, weight: float = 0.3, *, metric: Metric = "cosine"
) -> Tensor:
    """Re-ranked distances (Q, G) of features (Q, D) and (G, D). The published evaluator uses k1 50, k2 15."""
    return torch.cat(list(rerank_blocks(query, gallery, k1, k2, weight, metric=metric)))


@torch.no_grad()
def rerank_blocks(
    query: Tensor, gallery: Tensor, k1: int = 20, k2: int = 6, weight: float = 0.3, *, metric: Metric = "cosine"
) -> Iterator[Tensor]:
    """The same as consecutive blocks of rows (b, G), for `retrieval.rank_blocks`."""
    if k1 < 1 or k2 < 1 or not 0 <= weight <= 1:
        raise ValueError(f"re-ranking needs k1 and k2 of 1 or more and a weight in [0, 1], got {k1}, {k2}, {weight}")
    features = torch.cat([query, gallery]).to(torch.promote_types(query.dtype, torch.float32))
    if metric == "cosine":
        features = F.normalize(features)
    num_query, num_images = len(query), len(features)
    near = nearest_neighbours(features, features, min(max(k1 + 1, k2), num_images))
    farthest = near.farthest.to(features).clamp_min(torch.finfo(features.dtype).tiny)
    known = near.distances[:, : k1 + 1].to(features)
    row, column, square = _reciprocal_sets(near.indices[:, : k1 + 1], known, round(k1 / 2) + 1)
    new = square.isnan().nonzero().flatten()
    square[new] = _squared_distances(features, row[new], column[new])
    value = (-square / farthest[row]).exp()
    value /= torch.zeros_like(farthest).index_add_(0, row, value)[row]
    rows = _expanded(_Sparse.of(row, column, value, num_images), near.indices[:, :k2])
    lists = rows.transposed(num_query, num_images)
    squares = features.square().sum(1)
    for start in range(0, num_query, BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, num_query))
        distance = squares[block, None] + squares[num_query:] - 2 * features[block] @ features[num_query:].T
        overlap = _overlap(rows, lists, block, num_images - num_query)
        jaccard = 1 - overlap / (2 - overlap)
        yield (1 - weight) * jaccard + weight * distance.clamp_min_(0) / farthest[block, None]


def _reciprocal_sets(neighbours: Tensor, distances: Tensor, num_half: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries (row, column), sorted: each image's k-reciprocal set, grown by its members' half-size sets that lie in it
    by more than 2/3. Third, their squared distances, NaN where the column is not among the row's neighbours."""
    half = neighbours[:, :num_half]
    mutual, mutual_half = _is_mutual(neighbours), _is_mutual(half)
    num_images, entries, squares = len(neighbours), [], []
    for start in range(0, num_images, BLOCK_ROWS):
        near, own = neighbours[start : start + BLOCK_ROWS], mutual[start : start + BLOCK_ROWS]  # (b, K)
        members = torch.zeros(len(near), num_images + 1, dtype=torch.bool, device=near.device)  # last column: nobody
        members.scatter_(1, near.where(own, num_images), True)
        theirs, in_theirs = half[near], mutual_half[near]  # (b, K, half)
        shared = members.gather(1, theirs.flatten(1)).view_as(theirs) & in_theirs
        accepted = own & (3 * shared.sum(2) > 2 * in_theirs.sum(2))
        members.scatter_(1, theirs.where(in_theirs & accepted[..., None], num_images).flatten(1), True)
        entry = members[:, :num_images].nonzero()
        known = distances.new_full((len(near), num_images), torch.nan)
        known.scatter_(1, near, distances[start : start + BLOCK_ROWS])
        squares.append(known[entry[:, 0], entry[:, 1]])
        entries.append(entry + torch.tensor([start, 0], device=near.device))
    row, column = torch.cat(entries).unbind(1)
    return row, column, torch.cat(squares)


def _is_mutual(neighbours: Tensor) -> Tensor:
    """Whether each neighbour has the image among its own neighbours (N, K)."""
    images = torch.arange(len(neighbours), device=neighbours.device)[:, None, None]
    blocks = zip(neighbours.split(BLOCK_ROWS), images.split(BLOCK_ROWS))
    return torch.cat([(neighbours[near] == image).any(2) for near, image in blocks])


def _squared_distances(features: Tensor, row: Tensor, column: Tensor) -> Tensor:
    size = max(1, PAIR_ELEMENTS // features.shape[1])
    pairs = zip(row.split(size), column.split(size))
    return torch.cat([(features[r] - features[c]).square_().sum(1) for r, c in pairs])


def _expanded(rows: "_Sparse", nearest: Tensor) -> "_Sparse":
    """Every row replaced by the mean of the rows of its nearest images (N, k2)."""
    num_images, k2 = nearest.shape
    if k2 == 1:
        return rows
    entries, values = [], []
    for start in range(0, num_images, BLOCK_ROWS):
        near = nearest[start : start + BLOCK_ROWS]
        owner, place = _spread(rows.start[near.flatten()], rows.length[near.flatten()])
        dense = rows.value.new_zeros(len(near), num_images)
        dense.view(-1).index_add_(0, owner // k2 * num_images + rows.column[place], rows.value[place] / k2)
        entry = dense.nonzero()
        entries.append(entry + torch.tensor([start, 0], device=entry.device))
        values.append(dense[entry[:, 0], entry[:, 1]])
    row, column = torch.cat(entries).unbind(1)
    return _Sparse.of(row, column, torch.cat(values), num_images)


class _Sparse(NamedTuple):
    """A matrix by its entries, in the order of its rows."""

    start: Tensor  # of each row, in the entries
    length: Tensor  # of each row
    column: Tensor
    value: Tensor

    @classmethod
    def of(cls, row: Tensor, column: Tensor, value: Tensor, num_rows: int) -> "_Sparse":
        length = torch.bincount(row, minlength=num_rows)
        return cls(length.cumsum(0) - length, length, column, value)

    def transposed(self, first_row: int, num_columns: int) -> "_Sparse":
        """Of the rows from `first_row` on, counted from there: by column, which rows have an entry in it."""
        row = torch.arange(len(self.length), device=self.length.device).repeat_interleave(self.length)
        mine = slice(int(self.start[first_row]), None)
        order = self.column[mine].argsort(stable=True)
        return _Sparse.of(self.column[mine][order], row[mine][order] - first_row, self.value[mine][order], num_columns)


def _overlap(rows: _Sparse, lists: _Sparse, block: slice, num_gallery: int) -> Tensor:
    """sum_x min(V[q, x], V[g, x]) of a block of queries (b, G): each entry of q meets the list of its column."""
    overlap = rows.value.new_zeros(block.stop - block.start, num_gallery)
    query, entry = _spread(rows.start[block], rows.length[block])
    work = lists.length[rows.column[entry]].cumsum(0)
    sizes = torch.bincount(work // OVERLAPS).tolist()
    for query_part, entry_part in zip(query.split(sizes), entry.split(sizes)):
        column, value = rows.column[entry_part], rows.value[entry_part]
        owner, place = _spread(lists.start[column], lists.length[column])
        target = query_part[owner] * num_gallery + lists.column[place]
        overlap.view(-1).index_add_(0, target, torch.minimum(value[owner], lists.value[place]))
    return overlap


def _spread(start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """All places start[i] + 0 .. length[i] - 1, and the i that each belongs to."""
    owner = torch.arange(len(start), device=start.device).repeat_interleave(length)
    place = torch.arange(len(owner), device=start.device) + (start - length.cumsum(0) + length)[owner]
    return owner, place
