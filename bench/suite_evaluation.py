"""From features to mAP, mINP and CMC, to neighbours and to re-ranked distances, against the ways others do it.

Q queries, G gallery, D width. What is not installed of faiss and torchmetrics is left out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.builds import Launch
from bench.timing import Case, Settings, Work
from engine.rerank import k_reciprocal
from engine.retrieval import rank
from kernels import _distances, _rows, nearest_neighbours, neighbour_tiles, ranking_tiles

SOURCES = ("engine/retrieval.py", "engine/rerank.py", "kernels/ranking*.py", "kernels/neighbour*.py",
           "kernels/_counting.py", "kernels/_distances.py", "kernels/_rows.py")  # fmt: skip
MAX_RANK = 50
QUERY_BLOCK = 1024
NEAREST = 10
K1, K2, WEIGHT = 50, 15, 0.3  # of the published evaluator
ROUNDING = 5e-3  # ours is exact; in float32 some neighbours change places, and a point of the CMC moves by 1 / Q
HALF_PRECISION = 5e-2  # the published re-ranking rounds its weights and sums to it
SIZES: dict[str, list[tuple[int, int, int, int, int]]] = {  # queries, gallery, width, persons, cameras
    "quick": [(30, 200, 16, 10, 3)],
    "default": [(384, 4096, 5888, 128, 6)],
    "full": [(3368, 15913, 5888, 751, 6), (11659, 82161, 5888, 3060, 15)],  # Market-1501, MSMT17
}
RERANKED = {"quick": (20, 100, 16, 10, 3), "default": (500, 3000, 2048, 250, 6), "full": (500, 3000, 2048, 250, 6)}
Measures = Callable[..., Tensor]


def cases(settings: Settings) -> list[Case]:
    found = []
    for sizes in SIZES[settings.size]:
        shape = "Q {}, G {}, D {}, float32".format(*sizes)
        found.append(Case("mAP, mINP and CMC", shape, partial(evaluation, settings, *sizes)))
        found.append(Case(f"{NEAREST} nearest", shape, partial(neighbours, settings, *sizes)))
    if find_spec("torchmetrics"):
        sizes = SIZES["quick" if settings.size == "quick" else "default"][0]
        shape = "Q {}, G {}, D {}, float32".format(*sizes)
        found.append(Case("mAP alone", shape, partial(mean_precision, settings, *sizes)))
    sizes = RERANKED[settings.size]
    shape = "Q {}, G {}, D {}, float32".format(*sizes)
    found.append(Case(f"re-ranking, k {K1} and {K2}", shape, partial(reranking, settings, *sizes)))
    return found


def launches() -> Iterator[Launch]:
    """The kernels of exact ranks at the size of MSMT17, the gallery a span at a time."""
    queries, gallery, width, *_ = SIZES["full"][-1]
    images, span, tile = queries + gallery, ranking_tiles.SPAN, ranking_tiles.TILE
    features = torch.zeros(tile, width)
    rows, index = _rows.Rows("features", features, False), torch.zeros(tile, dtype=torch.int64)
    split = ranking_tiles.Split(torch.zeros(tile, 3 * width, dtype=torch.int8), features[:, 0], torch.zeros(3, tile))
    ids, edge = index.int(), torch.zeros(2, 11)  # matches, queries

    def count() -> None:
        persons = ids[:11], ids
        ranking_tiles.count_span(
            split, split, persons, features[:, 0], (edge, edge), edge.int(), index[:1], ids.expand(2, -1)
        )

    found = neighbour_tiles.Found.nothing(11, NEAREST, features.device)
    piece = slice(0, tile)

    def append() -> None:
        neighbour_tiles.append_piece(split, split, features[:, 0], piece, 0, found, NEAREST)

    yield Launch("lengths", lambda: _rows.lengths(features, 1), 4 * images * width, 2 * images * width)
    yield Launch("integers", lambda: ranking_tiles.split_rows(rows, index), 7 * images * width, 12 * images * width)
    yield Launch("counts of one span", count, 3 * (queries + span) * width, 12 * queries * span * width)
    queries = neighbour_tiles.QUERIES
    yield Launch("nearest of one span", append, 3 * (queries + span) * width, 12 * queries * span * width)
    yield Launch(
        "fp64 distance of a pair", lambda: _distances.exact_distances(rows, rows, index, index), 8 * width, 5 * width
    )


def made_up(
    settings: Settings, queries: int, gallery: int, width: int, persons: int, cameras: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Unit features of query and gallery, persons about as far apart as a trained model puts them; persons, cameras."""
    ids = [torch.randint(top, (count,), device=settings.device)
           for top in (persons, cameras) for count in (queries, gallery)]  # fmt: skip
    centers = torch.randn(persons, width, device=settings.device)
    noise = 0.5 * width**0.25
    features = [F.normalize(torch.randn(len(p), width, device=settings.device).mul_(noise).add_(centers[p]))
                for p in ids[:2]]  # fmt: skip
    return features, ids


@contextmanager
def evaluation(settings: Settings, *sizes: int) -> Iterator[Work]:
    features, ids = made_up(settings, *sizes)
    measures: dict[str, Measures] = {
        "ours": ours,
        "argsort in torch, blocks": sorted_blocks,
        "argsort in numpy, as published": published,
    }
    providers = {name: partial(function, *features, *ids) for name, function in measures.items()}
    moved = sum(x.nbytes for x in features)
    operations = 2 * sizes[0] * sizes[1] * sizes[2]
    yield Work(providers, ROUNDING, moved, operations, lambda result: (result[:2], result[2:]))


@contextmanager
def mean_precision(settings: Settings, *sizes: int) -> Iterator[Work]:
    features, ids = made_up(settings, *sizes)

    def torchmetrics() -> Tensor:
        query, gallery = features
        same = ids[0][:, None] == ids[1]
        counted = ~(same & (ids[2][:, None] == ids[3]))
        index = torch.arange(len(query), device=query.device)[:, None].expand_as(same)
        measure = import_module("torchmetrics.retrieval").RetrievalMAP(empty_target_action="skip")
        score = 1 + query @ gallery.T  # a match with a score below zero would not count as one
        result: Tensor = measure(score[counted], same[counted], indexes=index[counted])
        return result[None].cpu()

    providers = {"ours": lambda: ours(*features, *ids)[:1], "torchmetrics": torchmetrics}
    yield Work(providers, ROUNDING, operations=2 * sizes[0] * sizes[1] * sizes[2], compared=lambda result: [result])


@contextmanager
def neighbours(settings: Settings, *sizes: int) -> Iterator[Work]:
    (query, gallery), _ = made_up(settings, *sizes)

    def topk() -> Tensor:
        squares = gallery.square().sum(1)
        blocks = [torch.addmm(squares, x, gallery.T, alpha=-2).topk(NEAREST, largest=False)
                  for x in query.split(QUERY_BLOCK)]  # fmt: skip
        return torch.cat([values for values, _ in blocks]) + query.square().sum(1, keepdim=True)

    def faiss() -> Tensor:
        index = import_module("faiss").IndexFlatL2(gallery.shape[1])
        index.add(gallery.cpu().numpy())
        return torch.from_numpy(index.search(query.cpu().numpy(), NEAREST)[0])

    providers: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: nearest_neighbours(query, gallery, NEAREST).distances, "topk in torch, blocks": topk,
    }  # fmt: skip
    if find_spec("faiss"):
        providers["faiss, flat, on the CPU"] = faiss
    moved = query.nbytes + gallery.nbytes
    yield Work(providers, 1e-5, moved, 2 * sizes[0] * sizes[1] * sizes[2], lambda result: [result.cpu()])


@contextmanager
def reranking(settings: Settings, *sizes: int) -> Iterator[Work]:
    (query, gallery), _ = made_up(settings, *sizes)
    providers = {
        "ours": lambda: k_reciprocal(query, gallery, K1, K2, WEIGHT, metric="euclidean").cpu(),
        "numpy, as published": lambda: reranked_as_published(query.cpu(), gallery.cpu()),
    }
    yield Work(providers, HALF_PRECISION, compared=lambda result: [result])


def ours(*arguments: Tensor) -> Tensor:
    """mAP, mINP, CMC at 1 to MAX_RANK."""
    ranking = rank(*arguments, metric="euclidean", max_rank=MAX_RANK)
    return torch.tensor([ranking.mAP, ranking.mINP, *ranking.cmc.tolist()])


@torch.no_grad()
def sorted_blocks(
    query: Tensor, gallery: Tensor, query_persons: Tensor, gallery_persons: Tensor, query_cameras: Tensor,
    gallery_cameras: Tensor,
) -> Tensor:  # fmt: skip
    """The plain rewrite without a loop over queries, on any device; memory grows with a block of the matrix."""
    squares, parts = gallery.square().sum(1), []
    for x, person, camera in zip(*(t.split(QUERY_BLOCK) for t in (query, query_persons, query_cameras))):
        order = torch.addmm(squares, x, gallery.T, alpha=-2).argsort(1)
        same = gallery_persons[order] == person[:, None]
        junk = same & (gallery_cameras[order] == camera[:, None])
        match = same & ~junk
        place = torch.arange(1, len(gallery) + 1, device=x.device) - junk.cumsum(1)  # rank of every gallery image
        hits, counts = match.cumsum(1), match.sum(1)
        precision = (hits / place.clamp_min(1) * match).sum(1) / counts
        inverse = counts / (place * match).amax(1)
        best = place.where(match, len(gallery)).amin(1)
        parts.append(torch.stack([precision, inverse, best], 1)[counts > 0].double())
    precision, inverse, best = torch.cat(parts).unbind(1)
    found = torch.bincount(best.long().clamp_max(MAX_RANK + 1), minlength=MAX_RANK + 2)[1 : MAX_RANK + 1]
    return torch.cat([precision.mean()[None], inverse.mean()[None], found.cumsum(0) / len(best)]).cpu()


def published(query: Tensor, gallery: Tensor, *given: Tensor) -> Tensor:
    """As everybody does: the matrix goes to the host, numpy sorts every row, a loop walks over the queries."""
    squares = query.square().sum(1, keepdim=True) + gallery.square().sum(1)
    distances = squares.addmm(query, gallery.T, beta=1, alpha=-2).cpu().numpy()
    query_persons, gallery_persons, query_cameras, gallery_cameras = (ids.cpu().numpy() for ids in given)
    order = np.argsort(distances, axis=1)
    matches = (gallery_persons[order] == query_persons[:, None]).astype(np.int32)
    precisions: list[Any] = []
    inverses: list[Any] = []
    curves = []
    for i in range(len(distances)):
        junk = (gallery_persons[order[i]] == query_persons[i]) & (gallery_cameras[order[i]] == query_cameras[i])
        hit = matches[i][~junk]
        if not hit.any():
            continue
        hits = hit.cumsum()
        curves.append(np.minimum(hits, 1)[:MAX_RANK])
        last = np.flatnonzero(hit)[-1]
        inverses.append(hits[last] / (last + 1))
        precisions.append((hits / np.arange(1, len(hit) + 1) * hit).sum() / hits[-1])
    return torch.from_numpy(np.concatenate([[np.mean(precisions)], [np.mean(inverses)], np.mean(curves, 0)]))


def reranked_as_published(query: Tensor, gallery: Tensor) -> Tensor:
    """As everybody does: N x N arrays in numpy, half precision weights, loops over all images and all queries."""
    features, num_query = torch.cat([query, gallery]), len(query)
    squares = features.square().sum(1, keepdim=True)
    distances = (squares + squares.T).addmm(features, features.T, beta=1, alpha=-2).numpy()
    distances = np.transpose(distances / distances.max(0))
    order = np.argsort(distances).astype(np.int32)
    weights = np.zeros_like(distances, dtype=np.float16)
    for i in range(len(features)):
        own = _reciprocal(order, i, K1)
        members = own
        for j in own:
            theirs = _reciprocal(order, j, round(K1 / 2))
            if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
                members = np.append(members, theirs)
        members = np.unique(members)
        weight = np.exp(-distances[i, members])
        weights[i, members] = weight / weight.sum()
    weights = np.stack([weights[near].mean(0) for near in order[:, :K2]])
    lists = [np.flatnonzero(column) for column in weights.T]
    jaccard = np.zeros_like(distances[:num_query], dtype=np.float16)
    for i in range(num_query):
        overlap = np.zeros(len(features), np.float16)
        for x in np.flatnonzero(weights[i]):
            overlap[lists[x]] += np.minimum(weights[i, x], weights[lists[x], x])
        jaccard[i] = 1 - overlap / (2 - overlap)
    return torch.from_numpy((jaccard * (1 - WEIGHT) + distances[:num_query] * WEIGHT)[:, num_query:])


def _reciprocal(order: np.ndarray, i: int, k: int) -> np.ndarray:
    near = order[i, : k + 1]
    return near[np.flatnonzero((order[near, : k + 1] == i).any(1))]
