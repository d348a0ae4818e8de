"""Batch-hard triplet loss over all heads:  loss = mean_a softplus(d(a, p) - d(a, n)).

With a margin, max(0, d(a, p) - d(a, n) + margin) in place of the softplus. p is the farthest image of the anchor's
person (the anchor itself is one of them), n the nearest image of another person, d(x, y) = sqrt(max(|x - y|^2, 1e-12)).
Mined block by block without a graph; only the 2N chosen pairs are differentiated.
Source: Hermans et al., In Defense of the Triplet Loss, arXiv:1703.07737. N images, D width of a head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 2**22  # of the distance matrix at once
MIN_SQUARE = 1e-12


class BatchHard(NamedTuple):
    """Hardest pairs and losses; the lowest index wins ties. Distances carry no gradient."""

    losses: Tensor  # (heads,), mean over the valid anchors, 0 without any
    positive_distances: Tensor  # (heads, N)
    negative_distances: Tensor  # (heads, N)
    positive_indices: Tensor  # (heads, N)
    negative_indices: Tensor  # (heads, N)
    valid: Tensor  # (N,) bool: the anchor has another image of its person and one of another person


def batch_hard_triplet(
    features: Sequence[Tensor],
    persons: Tensor,
    *,
    margin: float | None = None,
    normalize: bool = False,
    product_dtype: torch.dtype | None = None,
) -> BatchHard:
    """Features are (N, D) per head; fp32 at least, whatever the precision around. `margin=None`: soft margin.

    `product_dtype` rounds inputs and result of the inner products in |x|^2 + |y|^2 - 2 x y, as the published code does
    under mixed precision; with norms of 30 to 90 its distances are mostly rounding noise. For comparison only.
    """
    for head, x in enumerate(features):
        if x.ndim != 2 or len(x) != len(persons) or not x.is_floating_point():
            raise ValueError(
                f"batch_hard_triplet: features must be floating (N, D) with N = {len(persons)} persons, "
                f"got {tuple(x.shape)} {x.dtype} in head {head}"
            )
    if not features or persons.ndim != 1 or len(persons) == 0:
        raise ValueError(
            f"batch_hard_triplet: needs one head and one image or more, "
            f"got {len(features)} heads and persons of shape {tuple(persons.shape)}"
        )
    valid = _valid_anchors(persons)
    with torch.autocast(persons.device.type, enabled=False):
        heads = [_one_head(x, persons, valid, margin, normalize, product_dtype) for x in features]
    losses, to_positive, to_negative, positive, negative = (torch.stack(columns) for columns in zip(*heads))
    return BatchHard(losses, to_positive, to_negative, positive, negative, valid)


def _valid_anchors(persons: Tensor) -> Tensor:
    ordered = persons.sort().values
    counts = torch.searchsorted(ordered, persons, right=True) - torch.searchsorted(ordered, persons)
    return (counts > 1) & (counts < len(persons))


def _one_head(
    x: Tensor, persons: Tensor, valid: Tensor, margin: float | None, normalize: bool, product_dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if normalize:
        x = x / (x.norm(dim=1, keepdim=True) + 1e-12)
    positive, negative = _mine(x.detach(), persons, product_dtype)
    to_positive, to_negative = (_distance(x, x[chosen], product_dtype) for chosen in (positive, negative))
    gap = to_positive - to_negative
    loss = -F.logsigmoid(-gap) if margin is None else (gap + margin).clamp_min(0)
    mean = torch.where(valid, loss, 0).sum() / valid.sum().clamp_min(1)
    return mean, to_positive.detach(), to_negative.detach(), positive, negative


def _mine(x: Tensor, persons: Tensor, product_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    squares, low = x.square().sum(1), x.to(product_dtype or x.dtype)
    rows = max(1, BLOCK_ELEMENTS // len(x))
    hardest = []
    for block, square, person in zip(low.split(rows), squares.split(rows), persons.split(rows)):
        distance = (square[:, None] + squares - 2 * (block @ low.T).to(x.dtype)).clamp_min(MIN_SQUARE)
        same = person[:, None] == persons
        hardest.append((distance.masked_fill(~same, -1).argmax(1), distance.masked_fill(same, torch.inf).argmin(1)))
    positives, negatives = zip(*hardest)
    return torch.cat(positives), torch.cat(negatives)


def _distance(x: Tensor, y: Tensor, product_dtype: torch.dtype | None) -> Tensor:
    if product_dtype is None:
        square = (x - y).square().sum(1)
    else:
        product = (x.to(product_dtype).to(x.dtype) * y.to(product_dtype).to(x.dtype)).sum(1).to(product_dtype)
        square = x.square().sum(1) + y.square().sum(1) - 2 * product.to(x.dtype)
    return square.clamp_min(MIN_SQUARE).sqrt()
