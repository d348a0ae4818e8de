"""From embeddings to mAP, CMC and mINP: the published protocol, exact, without a distance matrix.

A gallery image of the query's person counts only if another camera took it; the query's own camera is left out of the
ranking. A query without any such image is left out of the means. Ties go to the lower gallery index.
Q queries, G gallery.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fusionreid.errors import ReIDError
from fusionreid.kernels import nearest_neighbours, rank_counts, rank_counts_of

Ids: TypeAlias = Sequence[int] | Tensor
Metric = Literal["cosine", "euclidean"]  # squared Euclidean distance of rows at unit length, or of rows as they are
Gather: TypeAlias = Callable[[Tensor], Tensor]  # the rows of all processes, one process's below the other's


class RetrievalError(ReIDError, ValueError):
    """Query and gallery leave nothing to measure."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Ranks of all true matches, and the measures that follow from them as means over the valid queries.

    A query is valid if it has a match. Q queries, M matches of all queries together.
    """

    ranks: Tensor  # (M,) int64 from 1, ascending within a query; query i owns ranks[offsets[i] : offsets[i + 1]]
    offsets: Tensor  # (Q + 1,) int64
    max_rank: int = 50  # length of the CMC curve, whatever the size of the gallery
    recomputed: int = 0  # pairs that fp32 could not decide

    @cached_property
    def num_matches(self) -> Tensor:
        """Number of matches per query, (Q,) int64."""
        return self.offsets.diff()

    @property
    def num_valid(self) -> int:
        """Number of queries with a match."""
        return int((self.num_matches > 0).sum())

    @property
    def num_unmatched(self) -> int:
        """Number of queries without a match, which no mean counts."""
        return len(self.num_matches) - self.num_valid

    @cached_property
    def average_precisions(self) -> Tensor:
        """Average precision of each valid query, (num_valid,) fp64: its mean precision at its matches."""
        query = torch.arange(len(self.num_matches), device=self.ranks.device).repeat_interleave(self.num_matches)
        hits = torch.arange(1, len(self.ranks) + 1, device=self.ranks.device) - self.offsets[query]
        total = torch.zeros(len(self.num_matches), dtype=torch.float64, device=self.ranks.device)
        total.index_add_(0, query, hits / self.ranks.double())
        return (total / self.num_matches)[self.num_matches > 0]

    @cached_property
    def inverse_penalties(self) -> Tensor:
        """INP of each valid query, (num_valid,) fp64: its number of matches over the rank of the last one."""
        valid = self.num_matches > 0
        return self.num_matches[valid].double() / self.ranks[self.offsets[1:][valid] - 1]

    @cached_property
    def first_ranks(self) -> Tensor:
        """Rank of the nearest match of each valid query, (num_valid,) int64."""
        return self.ranks[self.offsets[:-1][self.num_matches > 0]]

    @cached_property
    def mAP(self) -> float:
        """Mean average precision."""
        return self.average_precisions.mean().item()

    @cached_property
    def mINP(self) -> float:
        """Mean inverse negative penalty."""
        return self.inverse_penalties.mean().item()

    @cached_property
    def cmc(self) -> Tensor:
        """CMC curve (max_rank,) fp64: share of the valid queries with a match among the first r = 1 ... max_rank."""
        best = self.first_ranks
        found = torch.bincount(best[best <= self.max_rank] - 1, minlength=self.max_rank)
        return found.cumsum(0).double() / len(best)

    def summary(self) -> str:
        """One line with mAP, mINP, Rank-1, 5 and 10 in percent, and the number of queries."""
        at = ", ".join(f"Rank-{r} {100 * self.cmc[r - 1]:.1f} %" for r in (1, 5, 10) if r <= self.max_rank)
        left_out = f", {self.num_unmatched} without a match left out" if self.num_unmatched else ""
        return f"mAP {100 * self.mAP:.1f} %, mINP {100 * self.mINP:.1f} %, {at} ({self.num_valid} queries{left_out})"

    @classmethod
    def of(cls, ranks: Tensor, num_matches: Tensor, max_rank: int, recomputed: int = 0) -> "Ranking":
        """Ranking of ranks (M,), query after query, and the number of matches per query (Q,)."""
        ends = num_matches.cumsum(0)
        return cls(ranks, torch.cat([ends.new_zeros(1), ends]), max_rank, recomputed)

    @classmethod
    def merge(cls, shares: Sequence["Ranking"]) -> "Ranking":
        """One ranking of consecutive shares of the queries against the same gallery."""
        ranks, num_matches = (torch.cat([getattr(s, name) for s in shares]) for name in ("ranks", "num_matches"))
        return cls.of(ranks, num_matches, shares[0].max_rank, sum(share.recomputed for share in shares))

    def gathered(self, gather: Gather) -> "Ranking":
        """The ranking of all queries, on the CPU, of which every process holds the i-th share, see `rank`."""
        recomputed = int(gather(torch.tensor([self.recomputed])).sum())
        return Ranking.of(gather(self.ranks.cpu()), gather(self.num_matches.cpu()), self.max_rank, recomputed)


def rows_of_share(count: int, share: tuple[int, int]) -> slice:
    """Rows of the i-th of n consecutive, nearly equal shares of `count` rows, for share (i, n)."""
    index, number = share
    return slice(count * index // number, count * (index + 1) // number)


def rank(
    query: Tensor,
    gallery: Tensor,
    query_persons: Ids,
    gallery_persons: Ids,
    query_cameras: Ids,
    gallery_cameras: Ids,
    *,
    metric: Metric = "cosine",
    max_rank: int = 50,
    share: tuple[int, int] = (0, 1),
) -> Ranking:
    """Rank the gallery features (G, D) for each of the query features (Q, D); persons and cameras are (Q,) and (G,).

    share (i, n) ranks only the i-th of n shares of the queries, to be joined by `Ranking.merge` or `Ranking.gathered`.
    The work is done on the device of the queries; a gallery in host memory is brought there block by block.
    """
    ids = _ids(len(query), len(gallery), query_persons, gallery_persons, query_cameras, gallery_cameras,
               device=query.device)  # fmt: skip
    check_matches(*ids)
    rows = rows_of_share(len(query), share)
    if rows.start == rows.stop:
        return Ranking(ids[0].new_zeros(0), ids[0].new_zeros(1), max_rank)
    counts = rank_counts(
        query[rows], gallery, ids[0][rows], ids[1], ids[2][rows], ids[3], normalize=_normalized(metric)
    )
    return Ranking(counts.ranks, counts.offsets, max_rank, counts.recomputed)


def rank_blocks(
    blocks: Iterable[Tensor],
    query_persons: Ids,
    gallery_persons: Ids,
    query_cameras: Ids,
    gallery_cameras: Ids,
    *,
    max_rank: int = 50,
    share: tuple[int, int] = (0, 1),
) -> Ranking:
    """Rank the gallery by given distances, such as those of `rerank.rerank_blocks`.

    `blocks` are consecutive rows (b, G) of the query x gallery matrix, those of share (i, n) of the queries; each is
    let go before the next is asked for.
    """
    ids = _ids(len(query_persons), len(gallery_persons), query_persons, gallery_persons, query_cameras, gallery_cameras)
    check_matches(*ids)
    mine = rows_of_share(len(ids[0]), share)
    rankings, start = [Ranking(ids[0].new_zeros(0), ids[0].new_zeros(1), max_rank)], mine.start
    for block in blocks:
        rows = slice(start, start + len(block))
        counts = rank_counts_of(block, *(t.to(block.device) for t in (ids[0][rows], ids[1], ids[2][rows], ids[3])))
        rankings.append(Ranking(counts.ranks.to(ids[0].device), counts.offsets.to(ids[0].device), max_rank))
        start = rows.stop
    if start != mine.stop:
        raise ValueError(f"rank_blocks: the blocks have {start - mine.start} rows for {mine.stop - mine.start} queries")
    return Ranking.merge(rankings)


def top_k(
    query: Tensor,
    gallery: Tensor,
    query_persons: Ids,
    gallery_persons: Ids,
    query_cameras: Ids,
    gallery_cameras: Ids,
    k: int,
    *,
    metric: Metric = "cosine",
) -> tuple[Tensor, Tensor]:
    """Squared distances and gallery indices (Q, k) of each query's first k images; inf and -1 past the end."""
    ids = _ids(len(query), len(gallery), query_persons, gallery_persons, query_cameras, gallery_cameras,
               device=query.device)  # fmt: skip
    persons, gallery_p, cameras, gallery_c = ids
    spare = int(_num_junk(*ids).max())
    near = nearest_neighbours(query, gallery, min(k + spare, len(gallery)), normalize=_normalized(metric))
    junk = (gallery_p[near.indices] == persons[:, None]) & (gallery_c[near.indices] == cameras[:, None])
    order = junk.byte().argsort(dim=1, stable=True)[:, :k]
    junk = junk.gather(1, order)
    distances = near.distances.gather(1, order).masked_fill(junk, torch.inf)
    missing = k - order.shape[1]
    indices = near.indices.gather(1, order).masked_fill(junk, -1)
    return F.pad(distances, (0, missing), value=torch.inf), F.pad(indices, (0, missing), value=-1)


def _normalized(metric: Metric) -> bool:
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    return metric == "cosine"


def _ids(num_query: int, num_gallery: int, *given: Ids, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    names = "query_persons", "gallery_persons", "query_cameras", "gallery_cameras"
    ids = tuple(torch.as_tensor(values, device=device).long() for values in given)
    for name, tensor, count in zip(names, ids, (num_query, num_gallery) * 2, strict=True):
        if tensor.shape != (count,):
            raise ValueError(f"{name} must hold one id for each of the {count} features, got {tuple(tensor.shape)}")
    return ids


def check_matches(
    query_persons: Tensor, gallery_persons: Tensor, query_cameras: Tensor, gallery_cameras: Tensor
) -> None:
    """Raise RetrievalError if no query has a match, and explain the camera rule; also if there is no image at all."""
    for name, persons in (("query", query_persons), ("gallery", gallery_persons)):
        if not len(persons):
            raise RetrievalError(f"nothing to rank: {name} has no image")
    same_person = count_equal(query_persons, gallery_persons)
    junk = _num_junk(query_persons, gallery_persons, query_cameras, gallery_cameras)
    if (same_person > junk).any():
        return
    cameras = [sorted(set(c.tolist())) for c in (query_cameras, gallery_cameras)]
    raise RetrievalError(
        f"none of the {len(query_persons)} queries has a match: an image counts as one only if it shows the query's "
        f"person and another camera took it. {int((same_person > 0).sum())} of them have their person in the gallery, "
        f"only from their own camera. Camera ids of the queries: {cameras[0][:8]}, of the gallery: {cameras[1][:8]}. "
        "Are they read from the right place in the file names? With one camera only, or without camera ids, give the "
        "query and the gallery two different ids"
    )


def count_equal(values: Tensor, among: Tensor) -> Tensor:
    """Number of entries of `among` (G,) that equal each of the values (Q,), (Q,) int64."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)


def _num_junk(query_persons: Tensor, gallery_persons: Tensor, query_cameras: Tensor, gallery_cameras: Tensor) -> Tensor:
    """Number of gallery images of each query's person from the query's own camera, (Q,)."""
    least = torch.minimum(query_cameras.min(), gallery_cameras.min())
    num_cameras = torch.maximum(query_cameras.max(), gallery_cameras.max()) - least + 1
    return count_equal(
        query_persons * num_cameras + query_cameras - least, gallery_persons * num_cameras + gallery_cameras - least
    )
