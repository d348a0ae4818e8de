"""Batch-hard triplet loss, forward and backward: one training batch with its six heads, and batches of thousands."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import TOLERANCE, Case, Settings, Work
from kernels import batch_hard_triplet

SOURCES = ("kernels/triplet.py",)
INSTANCES = 16  # images per person
HEADS = (2048, 768, 768, 768, 768, 768)
SIZES: dict[str, list[tuple[int, tuple[int, ...]]]] = {  # images, width of every head
    "quick": [(32, (8, 4))],
    "default": [(128, HEADS), (1024, (2048,))],
    "full": [(128, HEADS), (4096, (2048,)), (32768, (2048,))],
}
Loss = Callable[[Sequence[Tensor], Tensor], Tensor]


def cases(settings: Settings) -> list[Case]:
    return [
        Case("triplet, forward and backward", f"N {images}, D {' '.join(map(str, widths))}, float32",
             partial(triplet, settings, images, widths))
        for images, widths in SIZES[settings.size]
    ]  # fmt: skip


@contextmanager
def triplet(settings: Settings, images: int, widths: tuple[int, ...]) -> Iterator[Work]:
    persons = torch.arange(images, device=settings.device) // INSTANCES
    features = [planted(images, width).to(settings.device).requires_grad_() for width in widths]
    losses: dict[str, Loss] = {
        "ours": lambda x, persons: batch_hard_triplet(x, persons).losses,
        "as published": published,
        "dense, masked": dense,
    }
    if find_spec("pytorch_metric_learning"):
        losses["pytorch-metric-learning"] = metric_learning()
    if settings.compile:
        losses["dense, masked, compiled"] = torch.compile(dense)

    def call(loss: Loss) -> Sequence[Tensor]:
        values = loss(features, persons)
        return values, *torch.autograd.grad(values.sum(), features)

    operations = sum(2 * images**2 * width + 12 * images * width for width in widths)  # all products, 2 N gradients
    moved = 3 * sum(x.nbytes for x in features)  # read for mining and for the gradient, which is written
    providers = {name: partial(call, loss) for name, loss in losses.items()}
    yield Work(providers, 10 * TOLERANCE[torch.float32], moved, operations)


def planted(images: int, width: int) -> Tensor:
    """Features whose hardest pairs no rounding can exchange: persons in twos, image by image alike, two outliers each.

    Otherwise one of thousands of anchors finds another pair in another order of summation, with another gradient.
    """
    pairs = images // (2 * INSTANCES)
    x = torch.randn(pairs, 1, INSTANCES, width)
    away = torch.randn(pairs, 1, width)
    x[:, :, 0] += 4 * away
    x[:, :, 1] -= 2 * away
    return (x + 0.5 * torch.randn(pairs, 2, INSTANCES, width)).view(images, width) * width**-0.5


def published(features: Sequence[Tensor], persons: Tensor) -> Tensor:
    """As in the code that reid systems share: the mined distances are cut from the matrix by boolean indices."""
    losses = []
    for x in features:
        count = len(x)
        squares = x.square().sum(1, keepdim=True).expand(count, count)
        distances = (squares + squares.T).addmm(x, x.T, beta=1, alpha=-2).clamp(min=1e-12).sqrt()
        same = persons.expand(count, count).eq(persons.expand(count, count).T)
        positive = distances[same].view(count, -1).max(1).values
        negative = distances[~same].view(count, -1).min(1).values
        losses.append(F.soft_margin_loss(negative - positive, torch.ones_like(positive)))
    return torch.stack(losses)


def dense(features: Sequence[Tensor], persons: Tensor) -> Tensor:
    """The best plain rewrite: no indexing, nothing the host must wait for."""
    same = persons[:, None] == persons
    losses = []
    for x in features:
        squares = x.square().sum(1)
        distances = torch.addmm(squares[:, None] + squares, x, x.T, alpha=-2).clamp_min(1e-12).sqrt()
        positive, negative = (distances.masked_fill(~same, 0).amax(1), distances.masked_fill(same, torch.inf).amin(1))
        losses.append(F.softplus(positive - negative).mean())
    return torch.stack(losses)


def metric_learning() -> Loss:
    parts = ("distances", "losses", "miners", "reducers")
    distances, losses, miners, reducers = (import_module(f"pytorch_metric_learning.{part}") for part in parts)
    distance = distances.LpDistance(normalize_embeddings=False)
    miner = miners.BatchHardMiner(distance=distance)
    loss = losses.TripletMarginLoss(margin=0, smooth_loss=True, distance=distance, reducer=reducers.MeanReducer())
    return lambda features, persons: torch.stack([loss(x, persons, miner(x, persons)) for x in features])
