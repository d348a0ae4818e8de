"""Batch-hard triplet loss over all heads:  loss = mean_a softplus(d(a, p) - d(a, n)).

With a margin, max(0, d(a, p) - d(a, n) + margin) in place of the softplus. p is the farthest image of the anchor's
person (the anchor itself is one of them), n the nearest image of another person, d(x, y) = sqrt(max(|x - y|^2, 1e-12)).
Mined block by block without a graph; only the 2N chosen pairs are differentiated:  dloss/dx sums pull * (x - y) over
the pairs that x is part of, pull = dloss/dd / d.
Source: Hermans et al., In Defense of the Triplet Loss, arXiv:1703.07737. N images, D width of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels import triplet_kernels
from kernels._path import use_triton

BLOCK_ELEMENTS = 2**20  # of the distance matrix at once, in the plain path
PAIR_ROWS = 512  # pairs measured at once, in the plain path
MIN_SQUARE = 1e-12
SMALL = 512  # images of a batch that is mined in small tiles
PROGRAMS = 512  # four on each multiprocessor of a large GPU


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
    if normalize:
        features = [_normalized(x) for x in features]
    if product_dtype is None and all(use_triton(x) for x in features):
        rows = [x if x.stride(1) == 1 else x.contiguous() for x in features]
        terms, distances, indices, _, valid = _forward(rows, persons, margin)
        (to_positive, to_negative), (positive, negative) = distances.detach().unbind(), indices.unbind()
        return BatchHard(terms.sum(1), to_positive, to_negative, positive, negative, valid)
    valid = _valid_anchors(persons)
    with torch.autocast(persons.device.type, enabled=False):
        heads = [_one_head(x, persons, valid, margin, product_dtype) for x in features]
    losses, to_positive, to_negative, positive, negative = (torch.stack(columns) for columns in zip(*heads))
    return BatchHard(losses, to_positive, to_negative, positive, negative, valid)


def _normalized(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / (x.norm(dim=1, keepdim=True) + 1e-12)


@torch.library.custom_op("fusionreid::batch_hard_triplet_forward", mutates_args=())
def _forward(
    features: Sequence[Tensor], persons: Tensor, margin: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """terms (heads, N), whose sum is a head's loss; distances, indices, pulls (2, heads, N); valid (N,)."""
    terms, distances, indices, pulls, valid = outputs = _forward_outputs(features, persons, margin)
    heads, count, persons = len(features), len(persons), persons.contiguous()
    widths, strides = tuple(x.shape[1] for x in features), tuple(x.stride(0) for x in features)
    parts, columns, settings = _mining_launch(count, heads, max(x.itemsize for x in features))
    extremes = terms.new_empty(2, heads, count, parts)
    chosen = extremes.new_empty(extremes.shape, dtype=torch.int32)
    same = chosen.new_empty(count, parts)
    if count > SMALL:  # large tiles have no registers to spare for 64 bits of a person
        persons = torch.searchsorted(persons.sort().values, persons, out_int32=True)
    triplet_kernels.mine[triton.cdiv(count, settings["ROWS"]), parts, heads](
        tuple(features), widths, strides, persons, extremes, chosen, same, count, columns, S=parts, **settings
    )
    triplet_kernels.measure[count, heads](
        tuple(features), widths, strides, extremes, chosen, same, terms, distances, indices, pulls, valid, count,
        0.0 if margin is None else margin, SOFT=margin is None, S=parts, BLOCK_S=triton.next_power_of_2(parts),
        BLOCK_N=min(triton.next_power_of_2(count), 2048 // triton.next_power_of_2(parts)), BLOCK_D=1024, num_warps=4,
    )  # fmt: skip
    return outputs


def _mining_launch(count: int, heads: int, itemsize: int) -> tuple[int, int, dict[str, int]]:
    """Into how many parts the columns are split, columns per part, and the settings.

    A small batch spreads over all multiprocessors, one tile each; a large one reuses what it loads in large tiles.
    """
    if count <= SMALL:
        settings = {"ROWS": 32, "COLUMNS": 32, "BLOCK_D": 32, "num_warps": 8, "num_stages": 4}
        return triton.cdiv(count, 32), 32, settings
    settings = {"ROWS": 128, "COLUMNS": 64, "BLOCK_D": 64 // itemsize, "num_warps": 8, "num_stages": 4}
    rows, blocks = triton.cdiv(count, 128), triton.cdiv(count, 64)
    columns = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, rows * heads))) * 64
    return triton.cdiv(count, columns), columns, settings


@_forward.register_fake
def _forward_outputs(
    features: Sequence[Tensor], persons: Tensor, margin: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    terms = persons.new_empty(len(features), len(persons), dtype=torch.float32)
    pairs = terms.new_empty(2, *terms.shape)
    indices, valid = (
        persons.new_empty(pairs.shape, dtype=torch.int64),
        persons.new_empty(len(persons), dtype=torch.bool),
    )
    return terms, pairs, indices, torch.empty_like(pairs), valid


@torch.library.custom_op("fusionreid::batch_hard_triplet_backward", mutates_args=())
def _backward(upstream: Tensor, features: Sequence[Tensor], indices: Tensor, pulls: Tensor) -> list[Tensor]:
    """The gradient of every head, given that of its terms (heads, N)."""
    gradients = [x.new_empty(x.shape) for x in features]
    widths, strides = tuple(x.shape[1] for x in features), tuple(x.stride(0) for x in features)
    count, block = upstream.shape[1], 128
    triplet_kernels.differentiate[count, sum(triton.cdiv(width, block) for width in widths)](
        tuple(features), tuple(gradients), widths, strides, indices, pulls, upstream, *upstream.stride(), count,
        BLOCK_N=min(1024, max(16, triton.next_power_of_2(count))), CHUNK=8, BLOCK_D=block, num_warps=1,
    )  # fmt: skip
    return gradients


@_backward.register_fake
def _(upstream: Tensor, features: Sequence[Tensor], indices: Tensor, pulls: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in features]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, distances, indices, pulls, valid = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(distances, indices, pulls, valid)
    ctx.save_for_backward(indices, pulls, *inputs[0])


def _differentiate(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[list[Tensor] | None, None, None]:
    indices, pulls, *features = ctx.saved_tensors
    return None if upstream is None else _backward(upstream, features, indices, pulls), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _valid_anchors(persons: Tensor) -> Tensor:
    ordered = persons.sort().values
    counts = torch.searchsorted(ordered, persons, right=True) - torch.searchsorted(ordered, persons)
    return (counts > 1) & (counts < len(persons))


def _one_head(
    x: Tensor, persons: Tensor, valid: Tensor, margin: float | None, product_dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    positive, negative = _mine(x.detach(), persons, product_dtype)
    if product_dtype is None:
        to_positive, to_negative = _Distance.apply(x, positive), _Distance.apply(x, negative)
    else:
        to_positive, to_negative = (_noisy_distance(x, chosen, product_dtype) for chosen in (positive, negative))
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


def _noisy_distance(x: Tensor, chosen: Tensor, product_dtype: torch.dtype) -> Tensor:
    y = x[chosen]
    product = (x.to(product_dtype).to(x.dtype) * y.to(product_dtype).to(x.dtype)).sum(1).to(product_dtype)
    square = x.square().sum(1) + y.square().sum(1) - 2 * product.to(x.dtype)
    return square.clamp_min(MIN_SQUARE).sqrt()


class _Distance(torch.autograd.Function):
    """d(x, x[chosen]) of all rows; the differences are taken block by block, twice, and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor) -> Tensor:
        blocks = zip(x.split(PAIR_ROWS), chosen.split(PAIR_ROWS))
        squares = torch.cat([(rows - x[others]).square().sum(1) for rows, others in blocks])
        distance = squares.clamp_min(MIN_SQUARE).sqrt()
        ctx.save_for_backward(x, chosen, torch.where(squares < MIN_SQUARE, torch.inf, distance))
        return distance

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        x, chosen, distance = ctx.saved_tensors
        gradient = torch.zeros_like(x)
        blocks = (t.split(PAIR_ROWS) for t in (gradient, x, chosen, upstream / distance))
        for own, rows, others, pull in zip(*blocks):
            term = (rows - x[others]) * pull[:, None]
            own += term
            gradient.index_add_(0, others, term, alpha=-1)
        return gradient, None
