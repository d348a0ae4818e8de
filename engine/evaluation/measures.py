"""What people measure beside mAP and CMC: each a function of features, or of blocks of distances, and of ids.

`Ids` are persons of query and gallery, then cameras of query and gallery. Distance blocks are consecutive rows (b, G)
of the query x gallery matrix, which never exists as a whole. Q queries, G gallery, T matches of one query.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusionreid.engine.evaluation.retrieval import Metric, RetrievalError, rank
from fusionreid.kernels import nearest_neighbours

Ids = tuple[Tensor, Tensor, Tensor, Tensor]
BLOCK_ROWS = 256


class CameraPair(NamedTuple):
    """Queries of one camera against the gallery images of another."""

    query: int
    gallery: int
    num_valid: int  # queries with a match; the measures are means over them
    mAP: float
    rank1: float


class OperatingPoint(NamedTuple):
    """What a threshold lets through, over the pairs of all queries."""

    false_positive_rate: float  # of pairs of two persons, at most
    distance: float  # squared; pairs nearer than this are taken for one person
    true_positive_rate: float  # of the matches


def distance_blocks(query: Tensor, gallery: Tensor) -> Iterator[Tensor]:
    """Squared Euclidean distances by an fp32 product."""
    squares = gallery.norm(dim=1).square()
    for rows in query.split(BLOCK_ROWS):
        yield torch.addmm(squares, rows, gallery.T, alpha=-2).add_(rows.square().sum(1, keepdim=True)).clamp_min_(0)


def bootstrap(values: Tensor, *, level: float = 0.95, repeats: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Limits (K,) of the mean of each column of values (queries, K), from means over queries drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(len(values), (len(values),), generator=generator) for _ in range(repeats))
    means = torch.stack([values[rows].mean(0) for rows in drawn])
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype), dim=0)
    return low, high


def camera_pairs(query: Tensor, gallery: Tensor, ids: Ids, *, metric: Metric = "cosine") -> list[CameraPair]:
    """Every ordered pair of two cameras that share a person, by camera ids."""
    pairs = []
    for a in ids[2].unique().tolist():
        mine = ids[2] == a
        for b in ids[3].unique().tolist():
            theirs = ids[3] == b
            if a == b or not torch.isin(ids[0][mine], ids[1][theirs]).any():
                continue
            some = ids[0][mine], ids[1][theirs], ids[2][mine], ids[3][theirs]
            result = rank(query[mine], gallery[theirs], *some, metric=metric, max_rank=1)
            pairs.append(CameraPair(a, b, result.num_valid, result.mAP, result.cmc[0].item()))
    return pairs


def operating_points(blocks: Iterable[Tensor], ids: Ids, false_positive_rates: Sequence[float]) -> list[OperatingPoint]:
    """The loosest threshold for each rate that there are enough pairs to tell.

    The pairs of all queries are held against one threshold, as in verification; a query's person in its own camera is
    no pair.
    """
    same = sum(int((ids[1] == person).sum()) for person in ids[0].tolist())
    num_negative = len(ids[0]) * len(ids[1]) - same
    admitted = {rate: int(rate * num_negative) for rate in false_positive_rates if rate * num_negative >= 1}
    most = max(admitted.values(), default=0) + 1
    positive, negative = [], torch.empty(0)
    for block, person, camera in _with_ids(blocks, ids):
        of_person = ids[1] == person[:, None]
        positive.append(block[of_person & (ids[3] != camera[:, None])])
        negative = torch.cat([negative.to(block), block[~of_person]])
        if len(negative) > most:
            negative = negative.topk(most, largest=False, sorted=False).values
    negative = F.pad(negative.sort().values, (0, 1), value=torch.inf)
    match = torch.cat(positive)
    if not len(match):
        raise RetrievalError("no query has a match, so there is no rate of true positives")
    return [
        OperatingPoint(rate, negative[count].item(), (match < negative[count]).double().mean().item())
        for rate, count in admitted.items()
    ]


def single_gallery_shot(blocks: Iterable[Tensor], ids: Ids, *, max_rank: int = 50) -> Tensor:
    """CMC (max_rank,) of the classic CUHK03 protocol: of every person one image, drawn at random for each query.

    Not an average over some draws but the expectation over all of them: another person comes before the match with a
    probability p_j, its share of images that are nearer, and the rank is one more than a sum of independent events.
    """
    _, label = ids[1].unique(return_inverse=True)
    curves = []
    for block, persons, cameras in _with_ids(blocks, ids):
        for distance, person, camera in zip(block, persons, cameras):
            same = ids[1] == person
            valid = (~same | (ids[3] != camera)).nonzero().flatten()
            order = valid[distance[valid].argsort(stable=True)]
            if same[order].any():
                curves.append(_expected_cmc(label[order], same[order], max_rank))
    if not curves:
        raise RetrievalError("no query has a match, so there is no CMC")
    return torch.stack(curves).mean(0)


def _expected_cmc(label: Tensor, match: Tensor, max_rank: int) -> Tensor:
    """Of one query; labels of persons and whether it is the query's (n,), nearest first."""
    images = torch.bincount(label)
    nearer = torch.zeros(int(match.sum()) + 1, len(images), dtype=torch.float64)
    nearer.index_put_((match.cumsum(0), label), torch.ones((), dtype=torch.float64), accumulate=True)
    before = nearer.cumsum(0)[:-1] / images.clamp_min(1)  # (T, persons): p_j for each match
    before[:, label[match][0]] = 0
    chance = F.one_hot(torch.zeros(len(before), dtype=torch.int64), max_rank).double()  # of 0, 1, ... persons before
    for p in before[:, before.any(0)].T[:, :, None]:
        chance = chance * (1 - p) + F.pad(chance[:, :-1], (1, 0)) * p
    return chance.cumsum(1).mean(0)


def pool_queries(query: Tensor, persons: Tensor, cameras: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multi-query: the mean feature of each person in each camera, at unit length, with its person and camera."""
    groups, member = torch.stack([persons, cameras], 1).unique(dim=0, return_inverse=True)
    pooled = query.new_zeros(len(groups), query.shape[1]).index_add_(0, member, query)
    return F.normalize(pooled), *groups.T.contiguous()


def expand_queries(query: Tensor, gallery: Tensor, k: int, *, alpha: float = 3.0) -> Tensor:
    """Each query plus its k nearest gallery rows, weighted by cosine^alpha, at unit length.

    Source: Radenovic et al., Fine-tuning CNN Image Retrieval, arXiv:1711.02512.
    """
    near = nearest_neighbours(query, gallery, min(k, len(gallery)), normalize=True)
    weight = (1 - near.distances / 2).clamp_min(0).pow(alpha).to(query)
    expanded = F.normalize(query)
    for place in range(near.indices.shape[1]):
        expanded = expanded + weight[:, place, None] * F.normalize(gallery[near.indices[:, place]])
    return F.normalize(expanded)


def _with_ids(blocks: Iterable[Tensor], ids: Ids) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each block with the persons and cameras of its queries."""
    start = 0
    for block in blocks:
        rows = slice(start, start + len(block))
        yield block, ids[0][rows], ids[2][rows]
        start = rows.stop
