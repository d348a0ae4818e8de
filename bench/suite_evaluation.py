"""Evaluation: features to mAP, mINP and CMC, to neighbours and to re-ranked distances, against other ways.

Q queries, G gallery, D width. What is not installed of faiss and torchmetrics is left out.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.builds import Launch
from bench.evaluators import (
    BLOCK,
    MAX_RANK,
    by_place_in_python,
    in_tf32,
    product_alone,
    published,
    reranked_as_published,
    sorted_blocks,
)
from bench.timing import Case, Settings, Work
from fusionreid.engine.evaluation.rerank import k_reciprocal, rerank_blocks
from fusionreid.engine.evaluation.retrieval import rank
from fusionreid.kernels import _exact_distances as exact
from fusionreid.kernels import _int8_products as int8
from fusionreid.kernels import nearest_neighbours, neighbours, ranking

SOURCES = (
    "engine/evaluation/retrieval.py",
    "engine/evaluation/rerank.py",
    "kernels/ranking.py",
    "kernels/neighbours.py",
    "kernels/_exact_distances.py",
    "kernels/_int8_products.py",
    "bench/evaluators.py",
)
NEAREST = 10
K1, K2, WEIGHT = 50, 15, 0.3  # of the published evaluator
ROUNDING = 5e-3  # ours is exact; in float32 some neighbours change places, and a point of the CMC moves by 1 / Q
HALF_PRECISION = 5e-2  # the published re-ranking rounds its weights and sums to it
HOST_PAIRS = 10**8  # of more, an evaluation on the host takes minutes
SIZES: dict[str, list[tuple[int, int, int, int, int]]] = {  # queries, gallery, width, persons, cameras
    "quick": [(30, 200, 16, 10, 3)],
    "default": [(384, 4096, 5888, 128, 6)],
    "full": [(3368, 15913, 5888, 751, 6), (11659, 82161, 5888, 3060, 15)],  # Market-1501, MSMT17
}
RERANKED = {"quick": (20, 100, 16, 10, 3), "default": (500, 3000, 2048, 250, 6), "full": (500, 3000, 2048, 250, 6)}
Measures = Callable[..., Tensor]


def cases(settings: Settings) -> list[Case]:
    """List the cases of a size."""
    found = []
    for sizes in SIZES[settings.size][: None if settings.device.type == "cuda" else 1]:  # MSMT17 is for a GPU
        shape = "Q {}, G {}, D {}, float32".format(*sizes)
        found.append(Case("mAP, mINP and CMC", shape, partial(evaluation, settings, *sizes)))
        found.append(Case("ranks beside the product alone", shape, partial(beside_product, settings, *sizes)))
        found.append(Case(f"{NEAREST} nearest", shape, partial(nearest, settings, *sizes)))
    if find_spec("torchmetrics"):
        sizes = SIZES["quick" if settings.size == "quick" else "default"][0]
        shape = "Q {}, G {}, D {}, float32".format(*sizes)
        found.append(Case("mAP alone", shape, partial(mean_precision, settings, *sizes)))
    sizes = RERANKED[settings.size]
    shape = "Q {}, G {}, D {}, float32".format(*sizes)
    found.append(Case(f"re-ranking, k {K1} and {K2}", shape, partial(reranking, settings, *sizes)))
    if settings.size == "full":
        sizes = SIZES["full"][0]
        shape = "Q {}, G {}, D {}, float32".format(*sizes)
        found.append(Case("re-ranking beside the product alone", shape, partial(reranking_beside, settings, *sizes)))
    return found


def launches() -> Iterator[Launch]:
    """List the launches of exact ranks at the size of MSMT17, the gallery a span at a time."""
    queries, gallery, width, *_ = SIZES["full"][-1]
    images, span, tile = queries + gallery, int8.SPAN, int8.TILE
    features = torch.zeros(tile, width)
    rows, index = exact.Rows("features", features, False), torch.zeros(tile, dtype=torch.int64)
    split = int8.Split(torch.zeros(tile, 3 * width, dtype=torch.int8), features[:, 0], torch.zeros(3, tile))
    ids, edge = index.int(), torch.zeros(2, 11)  # matches, queries

    def count() -> None:
        persons = ids[:11], ids
        ranking.count_span(
            split, split, persons, features[:, 0], (edge, edge), edge.int(), index[:1], ids.expand(2, -1)
        )

    found = neighbours.Found.nothing(11, NEAREST, features.device)
    piece = slice(0, tile)

    def append() -> None:
        neighbours.append_piece(split, split, features[:, 0], piece, 0, found, NEAREST)

    yield Launch("lengths", lambda: exact.lengths(features, 1), 4 * images * width, 2 * images * width, images // tile)
    yield Launch(
        "integers", lambda: int8.split_rows(rows, index), 7 * images * width, 12 * images * width, images // tile
    )
    yield Launch(
        "counts of one span",
        count,
        3 * (queries + span) * width,
        12 * queries * span * width,
        queries * span // tile**2,
    )
    queries = neighbours.QUERIES
    yield Launch(
        "nearest of one span",
        append,
        3 * (queries + span) * width,
        12 * queries * span * width,
        queries * span // tile**2,
    )
    yield Launch(
        "fp64 distance of a pair", lambda: exact.exact_distances(rows, rows, index, index), 8 * width, 5 * width
    )


def made_up(
    settings: Settings, queries: int, gallery: int, width: int, persons: int, cameras: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Make up unit features with persons about as far apart as a trained model puts them, their persons and cameras."""
    ids = [
        torch.randint(top, (count,), device=settings.device)
        for top in (persons, cameras)
        for count in (queries, gallery)
    ]
    centers = torch.randn(persons, width, device=settings.device)
    noise = 0.5 * width**0.25
    features = [
        F.normalize(torch.randn(len(p), width, device=settings.device).mul_(noise).add_(centers[p])) for p in ids[:2]
    ]
    return features, ids


@contextmanager
def evaluation(settings: Settings, *sizes: int) -> Iterator[Work]:
    """Prepare an evaluation and its alternatives."""
    features, ids = made_up(settings, *sizes)
    measures: dict[str, Measures] = {"ours": ours, "argsort in torch, blocks": sorted_blocks}
    if settings.device.type == "cuda":
        measures["argsort in torch, blocks, TF32"] = in_tf32(sorted_blocks)
    if sizes[0] * sizes[1] <= HOST_PAIRS:
        measures["argsort in numpy, as published"] = published
        measures["and precision in Python, as torchreid"] = partial(published, precision=by_place_in_python)
    providers = {name: partial(function, *features, *ids) for name, function in measures.items()}
    moved = sum(x.nbytes for x in features)
    operations = 2 * sizes[0] * sizes[1] * sizes[2]
    yield Work(providers, ROUNDING, moved, operations, lambda result: (result[:2], result[2:]), on_host=True)


@contextmanager
def beside_product(settings: Settings, *sizes: int) -> Iterator[Work]:
    """Prepare ranks and the product alone, which is a part of them, also for features without any structure."""
    features, ids = made_up(settings, *sizes)
    noise = [F.normalize(torch.randn_like(x)) for x in features]
    providers: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(*features, *ids),
        "ours, features of pure noise": lambda: ours(*noise, *ids),
        "fp32 product alone": lambda: product_alone(*features),
    }
    moved = sum(x.nbytes for x in features)
    yield Work(providers, 0, moved, 2 * sizes[0] * sizes[1] * sizes[2], lambda _: [], on_host=True)


@contextmanager
def reranking_beside(settings: Settings, *sizes: int) -> Iterator[Work]:
    """Prepare re-ranking and the product of all pairs of images alone, each pair once."""
    (query, gallery), _ = made_up(settings, *sizes)
    images = torch.cat([query, gallery])
    half = images[: len(images) // 2]  # as many pairs
    providers: dict[str, Callable[[], object]] = {
        "ours": lambda: deque(rerank_blocks(images, len(query), K1, K2, WEIGHT, metric="euclidean"), 0),
        "fp32 product alone": lambda: product_alone(half, images),
    }
    yield Work(providers, 0, images.nbytes, len(images) ** 2 * sizes[2], lambda _: [], on_host=True)


@contextmanager
def mean_precision(settings: Settings, *sizes: int) -> Iterator[Work]:
    """Prepare the mAP alone and its alternatives."""
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
    operations = 2 * sizes[0] * sizes[1] * sizes[2]
    yield Work(providers, ROUNDING, operations=operations, compared=lambda result: [result], on_host=True)


@contextmanager
def nearest(settings: Settings, *sizes: int) -> Iterator[Work]:
    """Prepare the search of nearest neighbours and its alternatives."""
    (query, gallery), _ = made_up(settings, *sizes)

    def topk() -> Tensor:
        squares = gallery.square().sum(1)
        blocks = [torch.addmm(squares, x, gallery.T, alpha=-2).topk(NEAREST, largest=False) for x in query.split(BLOCK)]
        return torch.cat([values for values, _ in blocks]) + query.square().sum(1, keepdim=True)

    def faiss() -> Tensor:
        return torch.from_numpy(import_module("faiss").knn(query.cpu().numpy(), gallery.cpu().numpy(), NEAREST)[0])

    providers: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: nearest_neighbours(query, gallery, NEAREST).distances,
        "topk in torch, blocks": topk,
    }
    if find_spec("faiss") and len(query) * len(gallery) <= HOST_PAIRS:
        providers["faiss, on the CPU"] = faiss
    moved = query.nbytes + gallery.nbytes
    operations = 2 * sizes[0] * sizes[1] * sizes[2]
    yield Work(providers, 1e-5, moved, operations, lambda result: [result.cpu()], on_host=True)


@contextmanager
def reranking(settings: Settings, *sizes: int) -> Iterator[Work]:
    """Prepare k-reciprocal re-ranking and its alternatives."""
    (query, gallery), _ = made_up(settings, *sizes)
    providers = {
        "ours": lambda: k_reciprocal(query, gallery, K1, K2, WEIGHT, metric="euclidean").cpu(),
        "numpy, as published": lambda: reranked_as_published(query.cpu(), gallery.cpu(), K1, K2, WEIGHT),
    }
    yield Work(providers, HALF_PRECISION, compared=lambda result: [result], on_host=True)


def ours(*arguments: Tensor) -> Tensor:
    """Evaluate by our ranks: mAP, mINP, CMC at 1 to MAX_RANK."""
    ranking = rank(*arguments, metric="euclidean", max_rank=MAX_RANK)
    return torch.tensor([ranking.mAP, ranking.mINP, *ranking.cmc.tolist()])
