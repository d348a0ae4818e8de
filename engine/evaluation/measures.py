"""Measures besides mAP and CMC: functions of features, or of blocks of distances, and of ids.

`Ids` are persons of query and gallery, then cameras of query and gallery. Distance blocks are consecutive rows (b, G)
of the query x gallery matrix, which never exists as a whole. With `gather`, each process gives a share of the queries
(blocks and ids of those alone), and all get the measure of all queries. Q queries, G gallery, P persons of the gallery,
T matches of a query.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusionreid.engine.evaluation.retrieval import Gather, Ranking, RetrievalError, count_equal
from fusionreid.kernels import full_precision, nearest_neighbours

Ids = tuple[Tensor, Tensor, Tensor, Tensor]
BLOCK_ROWS = 128
COUNTS = 2**24  # of persons' images before matches, at once
NEGLIGIBLE = 2.0**-60  # a probability that no sum of others notices in fp64


class CameraPair(NamedTuple):
    """Result of the queries of one camera against the gallery images of another."""

    query: int
    gallery: int
    num_valid: int  # queries with a match; the measures are means over them
    mAP: float
    rank1: float


class OperatingPoint(NamedTuple):
    """Rates at one threshold over the pairs of all queries."""

    false_positive_rate: float  # of pairs of two persons, at most
    distance: float  # squared; pairs nearer than this are taken for one person
    true_positive_rate: float  # of the matches


def distance_blocks(query: Tensor, gallery: Tensor) -> Iterator[Tensor]:
    """Yield squared Euclidean distances (b, G) of features (Q, D) and (G, D), by an fp32 product."""
    squares = gallery.norm(dim=1).square()
    for rows in query.split(BLOCK_ROWS):
        with full_precision(rows):
            distances = torch.addmm(squares, rows, gallery.T, alpha=-2)
        yield distances.add_(rows.square().sum(1, keepdim=True)).clamp_min_(0)


def bootstrap(values: Tensor, *, level: float = 0.95, repeats: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Limits (K,) of the mean of each column of values (queries, K), from means over queries drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(len(values), (len(values),), generator=generator) for _ in range(repeats))
    means = torch.stack([values[rows].mean(0) for rows in drawn])
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype), dim=0)
    return low, high


def camera_pairs(
    query: Tensor, gallery: Tensor, ids: Ids, rank_pair: Callable[[Tensor, Tensor, Ids], Ranking]
) -> list[CameraPair]:
    """Results of every ordered pair of two cameras that share a person, by camera ids, each ranked by `rank_pair`."""
    pairs = []
    for a in ids[2].unique().tolist():
        mine = ids[2] == a
        for b in ids[3].unique().tolist():
            theirs = ids[3] == b
            if a == b or not torch.isin(ids[0][mine], ids[1][theirs]).any():
                continue
            pair_ids = ids[0][mine], ids[1][theirs], ids[2][mine], ids[3][theirs]
            result = rank_pair(query[mine], gallery[theirs], pair_ids)
            pairs.append(CameraPair(a, b, result.num_valid, result.mAP, result.cmc[0].item()))
    return pairs


def operating_points(
    blocks: Iterable[Tensor], ids: Ids, false_positive_rates: Sequence[float], *, gather: Gather = lambda rows: rows
) -> list[OperatingPoint]:
    """The loosest threshold for each rate that there are enough pairs to tell.

    The pairs of all queries are compared with one threshold, as in verification; a query and an image of its person in
    its own camera are no pair.
    """
    own_negative = len(ids[0]) * len(ids[1]) - int(count_equal(ids[0], ids[1]).sum())
    num_negative = int(gather(torch.tensor([own_negative])).sum())
    admitted = {rate: int(rate * num_negative) for rate in false_positive_rates if rate * num_negative >= 1}
    most = max(admitted.values(), default=0) + 1
    positive, nearest, num_kept, limit = [], [], 0, math.inf
    for block, (person, gallery_person, camera, gallery_camera) in with_ids(blocks, ids):
        of_person = gallery_person == person[:, None]
        positive.append(block[of_person & (gallery_camera != camera[:, None])])
        nearest.append(block[~of_person & (block < limit)])
        num_kept += len(nearest[-1])
        if num_kept > 2 * most:
            nearest = [_smallest(torch.cat(nearest), most)]
            num_kept, limit = most, nearest[0].max().item()
    match = gather(torch.cat(positive))
    if not len(match):
        raise RetrievalError("no query has a match, so there is no rate of true positives")
    negative = _smallest(gather(_smallest(torch.cat(nearest), most)), most)
    negative = F.pad(negative.sort().values, (0, 1), value=torch.inf)
    return [
        OperatingPoint(rate, negative[count].item(), (match < negative[count]).double().mean().item())
        for rate, count in admitted.items()
    ]


def _smallest(values: Tensor, count: int) -> Tensor:
    """The smallest of values (n,), at most so many, in any order."""
    return values.topk(count, largest=False, sorted=False).values if len(values) > count else values


def single_gallery_shot(
    blocks: Iterable[Tensor], ids: Ids, *, max_rank: int = 50, gather: Gather = lambda rows: rows
) -> Tensor:
    """CMC (max_rank,) fp64 of the classic CUHK03 protocol: one image of every person, drawn at random for each query.

    It is no average over some draws but the expectation over all of them: another person comes before the match with a
    probability p, its share of images that are nearer, and the rank is one more than a sum of independent events.
    Ties go to the lower gallery index.
    """
    label = ids[1].unique(return_inverse=True)[1].int()
    most = max(1, int(count_equal(ids[0], ids[1]).max()) if len(ids[0]) else 1)
    size = max(1, COUNTS // ((most + 1) * (int(label.max()) + 1)))
    sums = [torch.zeros(max_rank + 1, dtype=torch.float64, device=ids[0].device)]  # of curves, and how many
    for whole, (persons, gallery_person, cameras, gallery_camera) in with_ids(blocks, ids):
        for block, person, camera in zip(whole.split(size), persons.split(size), cameras.split(size)):
            same = gallery_person == person[:, None]
            match = same & (gallery_camera != camera[:, None])
            num_matches = match.sum(1)
            nearer, images = _nearer_images(block, same, match, label.to(block.device))
            query, chance = _chances_before_match(nearer, images, num_matches, max_rank)
            curves = chance.cumsum(1) / num_matches[query, None]
            sums.append(torch.cat([curves.sum(0), (num_matches > 0).sum()[None]]))
    total = torch.stack([one.to(sums[-1].device) for one in sums]).sum(0, keepdim=True)
    *curve, num_valid = gather(total).sum(0).tolist()
    if not num_valid:
        raise RetrievalError("no query has a match, so there is no CMC")
    return torch.tensor(curve, dtype=torch.float64) / num_valid


def _nearer_images(block: Tensor, same: Tensor, match: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Number of each person's images before each match, (b, T, P) int32, and in the gallery, (P,); 0 for the query's.

    Distances are block (b, G); `same` and `match` (b, G) mark the query's person and its matches, `label` (G,) is the
    number of each image's person. Matches ascend; queries with fewer than T have them first.
    """
    images, num_matches = torch.bincount(label), match.sum(1)
    most = int(num_matches.max()) if len(block) else 0
    query, image = match.nonzero(as_tuple=True)
    place = torch.arange(len(query), device=block.device) - (num_matches.cumsum(0) - num_matches)[query]
    distance = block.new_full((len(block), most), torch.inf)
    distance[query, place] = block[query, image]
    distance, order = distance.sort(dim=1, stable=True)
    passed = torch.searchsorted(distance, block, out_int32=True)  # matches before an image
    tied = ((F.pad(distance, (0, 1), value=torch.inf).gather(1, passed.long()) == block) & ~same).any(1)
    if tied.any():  # in these rows by distance, then by index
        index = image.new_zeros(len(block), most).index_put_((query, place), image).gather(1, order)[tied]
        up_to = torch.searchsorted(distance[tied], block[tied], right=True)
        key = (passed[tied] + up_to) * len(label) + torch.arange(len(label), device=block.device)
        of_match = key.gather(1, index).masked_fill_(distance[tied].isinf(), torch.iinfo(torch.int64).max)
        passed[tied] = torch.searchsorted(of_match, key, out_int32=True)
    passed.masked_fill_(same, most)
    row = torch.arange(len(block), dtype=torch.int32, device=block.device)[:, None] * (most + 1)
    cells = passed.add_(row).mul_(len(images)).add_(label).flatten()
    counts = torch.bincount(cells, minlength=len(block) * (most + 1) * len(images))
    return counts.view(len(block), most + 1, len(images))[:, :most].cumsum(1, dtype=torch.int32), images


def _chances_before_match(nearer: Tensor, images: Tensor, num_matches: Tensor, max_rank: int) -> tuple[Tensor, Tensor]:
    """Match's query (n,), and probability that 0, 1, ... other persons come before the match, (n, max_rank) fp64.

    `nearer` and `images` are those of `_nearer_images`. Matches that are surely further back than max_rank are left
    out: by Chernoff's bound fewer persons than the mean come before with a probability of at most
    exp(-(mean - count)^2 / (2 mean)).
    """
    mean, last = nearer.float() @ (1 / images.float()), max_rank - 1
    certain = (mean > last) & ((mean - last).square() > -2 * math.log(NEGLIGIBLE) * mean)
    exists = torch.arange(nearer.shape[1], device=nearer.device) < num_matches[:, None]
    query, match = (exists & ~certain).nonzero(as_tuple=True)
    nearer = nearer[query, match]  # (n, P)
    events = (nearer > 0).sum(1)
    order = events.argsort(descending=True, stable=True)
    query, nearer, events = query[order], nearer[order], events[order]
    row, person = nearer.nonzero(as_tuple=True)
    packed = images.new_zeros(len(nearer), int(events.max()) if len(events) else 0, dtype=torch.float64)
    place = torch.arange(len(row), device=row.device) - (events.cumsum(0) - events)[row]
    packed[row, place] = nearer[row, person] / images[person].double()
    chance = packed.new_zeros(len(packed), max_rank)
    chance[:, 0] = 1
    numbers = torch.arange(packed.shape[1], device=events.device)
    for event, count in enumerate(torch.searchsorted(-events, -numbers).tolist()):  # rows with more events than that
        rows = chance[:count]
        moved = rows * packed[:count, event, None]
        rows -= moved
        rows[:, 1:] += moved[:, :-1]
    return query, chance


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


def with_ids(blocks: Iterable[Tensor], ids: Ids) -> Iterator[tuple[Tensor, Ids]]:
    """Each block with the persons and cameras of its queries and of the gallery, on its device."""
    start = 0
    here = ids
    for block in blocks:
        here = tuple(t.to(block.device) for t in here)
        rows = slice(start, start + len(block))
        yield block, (here[0][rows], here[1], here[2][rows], here[3])
        start = rows.stop
