"""Evaluation and re-ranking as others do it, written plainly, and the product that none of them can do without."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024  # queries
MAX_RANK = 50
Precision = Callable[[np.ndarray], np.ndarray]


@torch.no_grad()
def product_alone(query: Tensor, gallery: Tensor) -> None:
    """Multiply all pairs in fp32, a block of queries after the other into the same memory."""
    memory = query.new_empty(min(BLOCK, len(query)), len(gallery))
    for x in query.split(BLOCK):
        torch.mm(x, gallery.T, out=memory[: len(x)])


@torch.no_grad()
def sorted_blocks(
    query: Tensor,
    gallery: Tensor,
    query_persons: Tensor,
    gallery_persons: Tensor,
    query_cameras: Tensor,
    gallery_cameras: Tensor,
) -> Tensor:
    """Evaluate without a loop over queries, on any device; memory grows with a block of the matrix."""
    squares, parts = gallery.square().sum(1), []
    for x, person, camera in zip(*(t.split(BLOCK) for t in (query, query_persons, query_cameras))):
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


def in_tf32(measure: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a measure so that products round their factors to TF32, on a GPU that has them."""

    def call(*arguments: Tensor) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return measure(*arguments)
        finally:
            torch.set_float32_matmul_precision(before)

    return call


def by_place(hits: np.ndarray) -> np.ndarray:
    """Divide hits by places: the precision at every place."""
    return hits / np.arange(1, len(hits) + 1)


def by_place_in_python(hits: np.ndarray) -> np.ndarray:
    """Compute the precision at every place as torchreid and fast-reid do without their Cython."""
    return np.asarray([count / (place + 1.0) for place, count in enumerate(hits)])


def published(query: Tensor, gallery: Tensor, *given: Tensor, precision: Precision = by_place) -> Tensor:
    """Evaluate as everybody does: the matrix goes to the host, numpy sorts every row, a loop walks over the queries."""
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
        precisions.append((precision(hits) * hit).sum() / hits[-1])
    return torch.from_numpy(np.concatenate([[np.mean(precisions)], [np.mean(inverses)], np.mean(curves, 0)]))


def reranked_as_published(query: Tensor, gallery: Tensor, k1: int, k2: int, weight: float) -> Tensor:
    """Re-rank as everybody does: N x N arrays in numpy, half precision weights, loops over images and queries."""
    features, num_query = torch.cat([query, gallery]), len(query)
    squares = features.square().sum(1, keepdim=True)
    distances = (squares + squares.T).addmm(features, features.T, beta=1, alpha=-2).numpy()
    distances = np.transpose(distances / distances.max(0))
    order = np.argsort(distances).astype(np.int32)
    weights = np.zeros_like(distances, dtype=np.float16)
    for i in range(len(features)):
        own = _reciprocal(order, i, k1)
        members = own
        for j in own:
            theirs = _reciprocal(order, j, round(k1 / 2))
            if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
                members = np.append(members, theirs)
        members = np.unique(members)
        value = np.exp(-distances[i, members])
        weights[i, members] = value / value.sum()
    weights = np.stack([weights[near].mean(0) for near in order[:, :k2]])
    lists = [np.flatnonzero(column) for column in weights.T]
    jaccard = np.zeros_like(distances[:num_query], dtype=np.float16)
    for i in range(num_query):
        overlap = np.zeros(len(features), np.float16)
        for x in np.flatnonzero(weights[i]):
            overlap[lists[x]] += np.minimum(weights[i, x], weights[lists[x], x])
        jaccard[i] = 1 - overlap / (2 - overlap)
    return torch.from_numpy((jaccard * (1 - weight) + distances[:num_query] * weight)[:, num_query:])


def _reciprocal(order: np.ndarray, i: int, k: int) -> np.ndarray:
    near = order[i, : k + 1]
    return near[np.flatnonzero((order[near, : k + 1] == i).any(1))]
