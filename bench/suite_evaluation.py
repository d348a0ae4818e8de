"""From features to mAP, mINP and CMC, against sorting the distance matrix.  Q queries, G gallery, D width."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import Case, Settings, Work
from engine.retrieval import rank

SOURCES = ("engine/retrieval.py", "kernels/ranking.py", "kernels/_distances.py")
MAX_RANK = 50
QUERY_BLOCK = 1024
ROUNDING = 5e-3  # ours is exact; in float32 some neighbours change places, and a point of the CMC moves by 1 / Q
SIZES: dict[str, list[tuple[int, int, int, int, int]]] = {  # queries, gallery, width, persons, cameras
    "quick": [(30, 200, 16, 10, 3)],
    "default": [(384, 4096, 5888, 128, 6)],
    "full": [(3368, 15913, 5888, 751, 6), (11659, 82161, 5888, 3060, 15)],  # Market-1501, MSMT17
}
Measures = Callable[..., Tensor]


def cases(settings: Settings) -> list[Case]:
    return [
        Case("mAP, mINP and CMC", f"Q {sizes[0]}, G {sizes[1]}, D {sizes[2]}, float32",
             partial(evaluation, settings, *sizes))
        for sizes in SIZES[settings.size]
    ]  # fmt: skip


@contextmanager
def evaluation(
    settings: Settings, queries: int, gallery: int, width: int, persons: int, cameras: int
) -> Iterator[Work]:
    ids = [torch.randint(top, (count,), device=settings.device)
           for top in (persons, cameras) for count in (queries, gallery)]  # fmt: skip
    centers = torch.randn(persons, width, device=settings.device)
    noise = 0.5 * width**0.25  # persons about as far apart as a trained model puts them
    features = [F.normalize(torch.randn(len(p), width, device=settings.device).mul_(noise).add_(centers[p]))
                for p in ids[:2]]  # fmt: skip
    measures: dict[str, Measures] = {
        "ours": ours,
        "argsort in torch, blocks": sorted_blocks,
        "argsort in numpy, as published": published,
    }
    providers = {name: partial(function, *features, *ids) for name, function in measures.items()}
    moved = sum(x.nbytes for x in features)
    yield Work(providers, ROUNDING, moved, 2 * queries * gallery * width, lambda result: (result[:2], result[2:]))


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
