"""Batch-hard triplet loss in plain torch, on a CPU and in float64: mining by blocks, distances of the chosen pairs.

N images, D width of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # of the distance matrix at once
PAIR_ROWS = 256  # anchors whose pairs are measured at once
MIN_SQUARE = 1e-12
FAR = 1e4  # |centre|^2 over the mean square around it, beyond which products are taken relative to the centre


def valid_anchors(persons: Tensor) -> Tensor:
    """Anchors (N,) with another image of their person and one of another person."""
    ordered = persons.sort().values
    counts = torch.searchsorted(ordered, persons, right=True) - torch.searchsorted(ordered, persons)
    return (counts > 1) & (counts < len(persons))


def mine(features: Sequence[Tensor], persons: Tensor, product_dtype: torch.dtype | None) -> list[Tensor]:
    """Farthest image of the anchor's person and nearest of another, (2, N) per head.

    Squares come from |x|^2 + |y|^2 - 2 x y, which cancels where all images lie far from 0 and close together: there
    they are taken relative to a centre among the images, but for `product_dtype`.
    """
    rows = max(1, BLOCK_ELEMENTS // len(persons))
    if product_dtype is None:
        features = [x - _centre(x) for x in features]
    low = [x.to(product_dtype or x.dtype) for x in features]
    squares = [torch.cat([block.square().sum(1) for block in x.split(rows)]) for x in features]
    hardest: list[list[Tensor]] = [[] for _ in features]
    for start in range(0, len(persons), rows):
        block = slice(start, start + rows)
        same = persons[block, None] == persons
        other = ~same
        for x, y, square, chosen in zip(features, low, squares, hardest):
            product = (y[block] @ y.T).to(x.dtype)
            distance = torch.sub(square[block, None] + square, product, alpha=2, out=product).clamp_min_(MIN_SQUARE)
            positive = distance.masked_fill(other, -1).argmax(1)
            chosen.append(torch.stack((positive, distance.masked_fill_(same, torch.inf).argmin(1))))
    return [torch.cat(blocks, 1) for blocks in hardest]


def _centre(x: Tensor) -> Tensor:
    """The median of three images, coordinate by coordinate (D,): one outlier does not move it.

    0 where it is not finite, and near 0, where rounding changes the squares by about 1e-3 of their size at most.
    """
    a, b, c = x[0], x[len(x) // 2], x[-1]
    centre = torch.fmax(torch.fmin(a, b), torch.fmin(torch.fmax(a, b), c))
    centre = centre.where(centre.isfinite(), 0)
    spread = (x - centre).square().sum(1).median()
    return centre.where(centre.square().sum() > FAR * spread, 0)


def noisy_distances(x: Tensor, chosen: Tensor, product_dtype: torch.dtype) -> Tensor:
    """d(x, x[chosen]) (2, N) by the published formula, its products rounded to `product_dtype`."""
    y = x[chosen]  # (2, N, D)
    product = (x.to(product_dtype).to(x.dtype) * y.to(product_dtype).to(x.dtype)).sum(2).to(product_dtype)
    square = x.square().sum(1) + y.square().sum(2) - 2 * product.to(x.dtype)
    return square.clamp_min(MIN_SQUARE).sqrt()


class Distances(torch.autograd.Function):
    """d(x, x[chosen]) of all rows and both chosen (2, N); the differences are taken block by block, twice, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor) -> Tensor:
        blocks = zip(x.split(PAIR_ROWS), chosen.split(PAIR_ROWS, 1))
        squares = torch.cat([(rows - x[others]).square_().sum(2) for rows, others in blocks], 1)
        distances = squares.clamp_min(MIN_SQUARE).sqrt()
        ctx.save_for_backward(x, chosen, torch.where(squares < MIN_SQUARE, torch.inf, distances))
        return distances

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        x, chosen, distances = ctx.saved_tensors
        gradient = torch.zeros_like(x)
        pulls = (upstream / distances)[..., None]
        blocks = zip(*(t.split(PAIR_ROWS) for t in (gradient, x)), *(t.split(PAIR_ROWS, 1) for t in (chosen, pulls)))
        for own, rows, others, pull in blocks:
            term = (rows - x[others]).mul_(pull)
            own += term.sum(0)
            gradient.index_add_(0, others.flatten(), term.flatten(0, 1), alpha=-1)
        return gradient, None
