"""Batch-hard triplet loss in plain torch, on a CPU and in float64: mining by blocks, then the chosen pairs.

Neighbouring heads of one width are computed together. H heads of one width D, N images.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # of the distance matrices at once
PAIR_ELEMENTS = 2**16  # of the differences to one partner at once: they stay in a core's cache
MIN_SQUARE = 1e-12  # below it nothing pulls
FAR = 100  # |centre| over the median distance from it, beyond which products are taken relative to the centre


class Loss(torch.autograd.Function):
    """Losses, distances (2, heads, N), indices (2, heads, N) and valid anchors, as in `BatchHard`, of all heads.

    The gradient is taken in the forward pass, from the differences that the distances are made of.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:  # torch.compile drops ctx where it counts one more
        persons, margin, differentiate, *features = inputs
        valid = valid_anchors(persons)
        invalid = ~valid
        distances, gradients = [], []
        with torch.autocast(persons.device.type, enabled=False):
            groups = list(_groups(features))
            indices = mine(groups, persons, None)
            for x, chosen in zip(groups, indices.split([len(x) for x in groups], 1)):
                gradients.append(torch.zeros_like(x) if differentiate else None)
                distances.append(_measure(x, chosen, invalid, margin, gradients[-1]))
        outputs = torch.cat(distances, 1), indices, valid
        count = valid.sum().clamp_min(1)
        if differentiate:
            ctx.save_for_backward(count, *gradients)
        ctx.types = [x.dtype for x in features]
        ctx.mark_non_differentiable(*outputs)
        return _mean_losses(outputs[0], invalid, count, margin), *outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        count, *gradients = ctx.saved_tensors
        factors = (upstream / count)[:, None, None].split([len(x) for x in gradients])
        scaled = [x for group, factor in zip(gradients, factors) for x in (group * factor).unbind()]
        return None, None, None, *(x.to(dtype) for x, dtype in zip(scaled, ctx.types))


def noisy_loss(
    features: Sequence[Tensor], persons: Tensor, margin: float | None, product_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return what `Loss` does, by the published formula, its products rounded to `product_dtype`."""
    valid = valid_anchors(persons)
    distances = []
    with torch.autocast(persons.device.type, enabled=False):
        groups = list(_groups(features))
        indices = mine([x.detach() for x in groups], persons, product_dtype)
        for x, chosen in zip(groups, indices.split([len(x) for x in groups], 1)):
            y = x.flatten(0, 1)[_rows(chosen, slice(None))]  # (2, H, N, D)
            product = (x.to(product_dtype).to(x.dtype) * y.to(product_dtype).to(x.dtype)).sum(3).to(product_dtype)
            square = x.square().sum(2) + y.square().sum(3) - 2 * product.to(x.dtype)
            distances.append(square.clamp_min(MIN_SQUARE).sqrt())
        pairs = torch.cat(distances, 1)
        losses = _mean_losses(pairs, ~valid, valid.sum().clamp_min(1), margin)
    return losses, pairs.detach(), indices, valid


def valid_anchors(persons: Tensor) -> Tensor:
    """Anchors (N,) with another image of their person and one of another person."""
    ordered = persons.sort().values
    counts = torch.searchsorted(ordered, persons, right=True) - torch.searchsorted(ordered, persons)
    return (counts > 1) & (counts < len(persons))


def mine(groups: Sequence[Tensor], persons: Tensor, product_dtype: torch.dtype | None) -> Tensor:
    """Farthest image of the anchor's person and nearest of another, (2, heads, N), from features (H, N, D) in groups.

    Squares come from |x|^2 + |y|^2 - 2 x y, which cancels where all images lie far from 0 and close together: there
    they are taken relative to a centre among the images, but for `product_dtype`.
    """
    if product_dtype is None:
        groups = [x - _centre(x) for x in groups]
    low = [x.to(product_dtype or x.dtype) for x in groups]
    square = torch.cat([_squares(x) for x in groups])  # (heads, N)
    hardest = []
    rows = max(1, BLOCK_ELEMENTS // square.numel())
    for start in range(0, len(persons), rows):
        block = slice(start, start + rows)
        same = persons[block, None] == persons
        product = torch.cat([torch.bmm(y[:, block], y.mT).to(x.dtype) for x, y in zip(groups, low)])
        distance = torch.sub(square[:, block, None] + square[:, None], product, alpha=2, out=product)
        distance.clamp_min_(MIN_SQUARE)
        positive = distance.masked_fill(~same, -1).argmax(2)
        hardest.append(torch.stack((positive, distance.masked_fill_(same, torch.inf).argmin(2))))
    return torch.cat(hardest, 2)


def _squares(x: Tensor) -> Tensor:
    """|x|^2 of every image, (H, N)."""
    heads, _, width = x.shape
    blocks = x.split(max(1, PAIR_ELEMENTS // (heads * width)), 1)
    return torch.cat([block.square().sum(2) for block in blocks], 1)


def _centre(x: Tensor) -> Tensor:
    """The median of three images, coordinate by coordinate (H, 1, D): one outlier does not move it.

    0 where it is not finite, and near 0, where rounding changes the squares by about 1e-3 of their size at most.
    """
    a, b, c = x[:, :1], x[:, x.shape[1] // 2, None], x[:, -1:]
    centre = torch.minimum(a, b).maximum(torch.maximum(a, b).minimum(c)).nan_to_num_(0, 0, 0)
    few = x[:, :: max(1, x.shape[1] // 8)]
    spread = torch.linalg.vector_norm(few - centre, dim=2, keepdim=True).median(1, keepdim=True).values
    return centre * (torch.linalg.vector_norm(centre, dim=2, keepdim=True) > FAR * spread)


def _groups(features: Sequence[Tensor]) -> Iterator[Tensor]:
    """Neighbours of one width as one tensor (H, N, D), in fp32 at least."""
    start = 0
    for stop in range(1, len(features) + 1):  # torch.compile can't trace groupby
        if stop == len(features) or features[stop].shape[1] != features[start].shape[1]:
            x = torch.stack(tuple(features[start:stop]))
            yield x.to(torch.promote_types(x.dtype, torch.float32))
            start = stop


def _rows(chosen: Tensor, block: slice) -> Tensor:
    """The images chosen by a block of anchors, numbered through over the heads; (2, H, anchors)."""
    _, heads, count = chosen.shape
    return chosen[:, :, block] + torch.arange(0, heads * count, count, device=chosen.device)[:, None]


def _measure(x: Tensor, chosen: Tensor, invalid: Tensor, margin: float | None, gradient: Tensor | None) -> Tensor:
    """Distances (2, H, N), block by block; adds to the gradient of the anchors' summed loss, if it is wanted."""
    heads, count, width = x.shape
    distances = []
    rows = max(1, PAIR_ELEMENTS // (heads * width))
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        partners = _rows(chosen, block)
        difference = F.embedding(partners, x.flatten(0, 1)).sub_(x[:, block])  # (2, H, rows, D)
        square = difference.square().sum(3)
        distance = square.clamp_min(MIN_SQUARE).sqrt_()
        distances.append(distance)
        if gradient is not None:
            gap = distance[0] - distance[1]
            slope = gap.sigmoid() if margin is None else (gap + margin >= 0).to(x.dtype)
            pull = torch.stack((slope, -slope)).div_(distance).masked_fill_((square < MIN_SQUARE) | invalid[block], 0)
            difference.mul_(pull[..., None])
            gradient[:, block].sub_(difference[0]).sub_(difference[1])
            gradient.flatten(0, 1).index_add_(0, partners.flatten(), difference.flatten(0, 2))
    return torch.cat(distances, 2)


def _mean_losses(distances: Tensor, invalid: Tensor, count: Tensor, margin: float | None) -> Tensor:
    gap = distances[0] - distances[1]  # (heads, N)
    losses = -F.logsigmoid(-gap) if margin is None else (gap + margin).clamp_min(0)
    return losses.masked_fill(invalid, 0).sum(1) / count
