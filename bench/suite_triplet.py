"""Batch-hard triplet loss, forward and backward: one training batch with its six heads, and batches of thousands.

The kernels of the cross-entropies are built here as well: the two are the loss of a training step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.builds import Launch
from bench.timing import TOLERANCE, Case, Settings, Work
from fusionreid.kernels import batch_hard_triplet, cross_entropy

SOURCES = ("kernels/triplet.py", "kernels/_triplet_torch.py", "kernels/cross_entropy.py")
INSTANCES = 16  # images per person
HEADS = (2048, 768, 768, 768, 768, 768)
SIZES: dict[str, list[tuple[int, tuple[int, ...]]]] = {  # images, width of every head
    "quick": [(32, (8, 4))],
    "default": [(128, HEADS), (4096, (768,))],
    "full": [(128, HEADS), (4096, (2048,)), (32768, (2048,))],
}
Loss = Callable[[Sequence[Tensor], Tensor], Tensor]


def cases(settings: Settings) -> list[Case]:
    """List the cases of a size."""
    return [
        Case(
            "triplet, forward and backward",
            f"N {images}, D {' '.join(map(str, widths))}, float32",
            partial(triplet, settings, images, widths),
        )
        for images, widths in SIZES[settings.size]
    ]


def launches() -> Iterator[Launch]:
    """List the launches of a training batch's losses, in mixed precision too, and of large batches."""
    fp32, bf16 = torch.float32, torch.bfloat16
    mixed = (fp32, bf16, fp32, fp32, bf16, bf16)
    for images, widths, types in (
        (128, HEADS, (fp32,) * 6),
        (128, HEADS, mixed),
        (4096, HEADS[:1], (fp32,)),
        (4096, HEADS[:1], (bf16,)),
    ):
        x = [torch.zeros(images, width, dtype=dtype) for width, dtype in zip(widths, types)]
        persons = torch.arange(images) // INSTANCES
        name = f"triplet, N {images}, {'mixed' if types is mixed else str(types[0]).removeprefix('torch.')}"
        moved, operations = sum(t.nbytes for t in x), images * (images + 1) * sum(widths)
        yield Launch(f"{name}, forward", partial(_triplet_forward, x, persons), moved, operations)
        yield Launch(f"{name}, backward", partial(_triplet_backward, x), 2 * moved, 12 * images * sum(widths))
    for classes, types in ((751, (fp32,) * 6), (1041, (bf16,) * 6), (100_000, (bf16,))):
        z, persons = [torch.zeros(128, classes, dtype=dtype) for dtype in types], torch.zeros(128, dtype=torch.int64)
        name = f"cross-entropy, K {classes}, {str(types[0]).removeprefix('torch.')}"
        moved, values = sum(t.nbytes for t in z), sum(t.numel() for t in z)
        yield Launch(f"{name}, forward", partial(_entropy_forward, z, persons), moved, 4 * values)
        yield Launch(f"{name}, backward", partial(_entropy_backward, z, persons), 2 * moved, 4 * values)


def _triplet_forward(x: list[Tensor], persons: Tensor) -> object:
    return torch.ops.fusionreid.batch_hard_triplet_forward(x, persons, None)


def _triplet_backward(x: list[Tensor]) -> object:
    pairs = torch.zeros(5, len(x), len(x[0]))
    return torch.ops.fusionreid.batch_hard_triplet_backward(pairs[0, :, 0], x, pairs[0, :, 0], pairs, pairs[:2].long())


def _entropy_forward(z: list[Tensor], persons: Tensor) -> object:
    return cross_entropy._forward(z, persons, 0.1)


def _entropy_backward(z: list[Tensor], persons: Tensor) -> object:
    lse = torch.zeros(2, len(z), len(persons))
    return cross_entropy._backward(lse[0, :, 0], z, persons, lse, 0.1)


@contextmanager
def triplet(settings: Settings, images: int, widths: tuple[int, ...]) -> Iterator[Work]:
    """Prepare the triplet loss and its alternatives."""
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

    operations = images * (images + 1 + 12) * sum(widths)  # products of the upper triangle, 2 N gradients
    moved = 3 * sum(x.nbytes for x in features)  # read for mining and for the gradient, which is written
    providers = {name: partial(call, loss) for name, loss in losses.items()}
    yield Work(providers, 10 * TOLERANCE[torch.float32], moved, operations)


def planted(images: int, width: int) -> Tensor:
    """Make features whose hardest pairs no rounding exchanges: persons in twos, images alike, two outliers each.

    Otherwise one of thousands of anchors finds another pair in another order of summation, with another gradient.
    """
    pairs = images // (2 * INSTANCES)
    x = torch.randn(pairs, 1, INSTANCES, width)
    away = torch.randn(pairs, 1, width)
    x[:, :, 0] += 4 * away
    x[:, :, 1] -= 2 * away
    return (x + 0.5 * torch.randn(pairs, 2, INSTANCES, width)).view(images, width) * width**-0.5


def published(features: Sequence[Tensor], persons: Tensor) -> Tensor:
    """Compute the loss as ReID projects do: boolean indices cut the mined distances from the matrix."""
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
    """Compute the loss by the best plain rewrite: no indexing, nothing that the host waits for."""
    same = persons[:, None] == persons
    losses = []
    for x in features:
        squares = x.square().sum(1)
        distances = torch.addmm(squares[:, None] + squares, x, x.T, alpha=-2).clamp_min(1e-12).sqrt()
        positive, negative = (distances.masked_fill(~same, 0).amax(1), distances.masked_fill(same, torch.inf).amin(1))
        losses.append(F.softplus(positive - negative).mean())
    return torch.stack(losses)


def metric_learning() -> Loss:
    """Make the loss of pytorch-metric-learning."""
    parts = ("distances", "losses", "miners", "reducers")
    distances, losses, miners, reducers = (import_module(f"pytorch_metric_learning.{part}") for part in parts)
    distance = distances.LpDistance(normalize_embeddings=False)
    miner = miners.BatchHardMiner(distance=distance)
    loss = losses.TripletMarginLoss(margin=0, smooth_loss=True, distance=distance, reducer=reducers.MeanReducer())
    return lambda features, persons: torch.stack([loss(x, persons, miner(x, persons)) for x in features])
