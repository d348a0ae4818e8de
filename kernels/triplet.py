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

from fusionreid.kernels import triplet_backward, triplet_forward
from fusionreid.kernels._path import capability, on_device_of, use_triton

BLOCK_ELEMENTS = 2**20  # of the distance matrix at once, in the plain path
PAIR_ROWS = 256  # anchors whose pairs are measured at once, in the plain path
MIN_SQUARE = 1e-12
SMALL = 1024  # images of a batch that is mined in small tiles, which spread it over all multiprocessors


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
        losses, _, distances, indices, _, valid = _forward(rows, persons, margin)
        (to_positive, to_negative), (positive, negative) = distances.unbind(), indices.unbind()
        return BatchHard(losses, to_positive, to_negative, positive, negative, valid)
    valid = _valid_anchors(persons)
    with torch.autocast(persons.device.type, enabled=False):
        exact = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in features]
        hardest = _mine([x.detach() for x in exact], persons, product_dtype)  # (2, N) per head
        if product_dtype is None:
            pairs = [_Distances.apply(x, chosen) for x, chosen in zip(exact, hardest)]
        else:
            pairs = [_noisy_distances(x, chosen, product_dtype) for x, chosen in zip(exact, hardest)]
        to_positive, to_negative = torch.stack(pairs, 1)
        positive, negative = torch.stack(hardest, 1)
        gap = to_positive - to_negative  # (heads, N)
        loss = -F.logsigmoid(-gap) if margin is None else (gap + margin).clamp_min(0)
        losses = torch.where(valid, loss, 0).sum(1) / valid.sum().clamp_min(1)
    return BatchHard(losses, to_positive.detach(), to_negative.detach(), positive, negative, valid)


def _normalized(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / (x.norm(dim=1, keepdim=True) + 1e-12)


@torch.library.custom_op("fusionreid::batch_hard_triplet_forward", mutates_args=())
def _forward(
    features: Sequence[Tensor], persons: Tensor, margin: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """losses and shares (heads,), a share being 1 / valid anchors; distances, indices, pulls (2, heads, N); valid."""
    losses, shares, distances, indices, pulls, valid = outputs = _forward_outputs(features, persons, margin)
    heads, count, persons = len(features), len(persons), persons.contiguous()
    if count > SMALL:  # large tiles have no registers to spare for 64 bits of a person
        persons = torch.searchsorted(persons.sort().values, persons, out_int32=True)
    with on_device_of(persons):
        settings = _tiles(count, max(x.itemsize for x in features))
        blocks = triton.cdiv(count, settings["ROWS"])
        state = persons.new_zeros(heads, 2 * count + blocks + 1, dtype=torch.int64)
        triplet_forward.forward[blocks * (blocks + 1) // 2, heads](
            tuple(features), *_layout(features), persons, state, losses.new_empty(heads, count), losses, shares,
            distances, indices, pulls, valid, count, 0.0 if margin is None else margin, SOFT=margin is None, **settings,
        )  # fmt: skip
    return outputs


def _tiles(count: int, itemsize: int) -> dict[str, int]:
    """A small batch spreads over all multiprocessors, the warps of a program share the width; a large one reuses loads.

    The largest tiles that spill nothing, as compiled by Triton 3.6 to 3.9; not timed.
    """
    if count <= SMALL:
        return {"ROWS": 16, "SPLIT": 8, "BLOCK_D": 32, "num_warps": 8}
    rows, warps = (128, 8) if capability() == 90 else (64, 4)
    return {"ROWS": rows, "SPLIT": 1, "BLOCK_D": 64 // itemsize, "num_warps": warps, "num_stages": 4}


def _layout(features: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(x.shape[1] for x in features), tuple(x.stride(0) for x in features)


@_forward.register_fake
def _forward_outputs(
    features: Sequence[Tensor], persons: Tensor, margin: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    losses = persons.new_empty(len(features), dtype=torch.float32)
    pairs = losses.new_empty(2, len(features), len(persons))
    indices, valid = (
        persons.new_empty(pairs.shape, dtype=torch.int64),
        persons.new_empty(len(persons), dtype=torch.bool),
    )
    return losses, torch.empty_like(losses), pairs, indices, torch.empty_like(pairs), valid


@torch.library.custom_op("fusionreid::batch_hard_triplet_backward", mutates_args=())
def _backward(
    upstream: Tensor, features: Sequence[Tensor], shares: Tensor, indices: Tensor, pulls: Tensor
) -> list[Tensor]:
    """The gradient of every head, given that of its loss (heads,)."""
    gradients = [x.new_empty(x.shape) for x in features]
    _, heads, count = indices.shape
    order = starts = indices  # not read
    if count > SMALL:
        chosen, order = indices.transpose(0, 1).reshape(heads, 2 * count).sort(stable=True)
        starts = torch.searchsorted(chosen, torch.arange(count + 1, device=chosen.device).repeat(heads, 1))
    with on_device_of(indices):
        triplet_backward.differentiate[count, sum(triton.cdiv(x.shape[1], 256) for x in features)](
            tuple(features), tuple(gradients), *_layout(features), indices, pulls, upstream, upstream.stride(0), shares,
            order, starts, count, SORTED=count > SMALL, BLOCK_E=256, CHUNK=4, BLOCK_D=256, num_warps=1,
        )  # fmt: skip
    return gradients


@_backward.register_fake
def _(upstream: Tensor, features: Sequence[Tensor], shares: Tensor, indices: Tensor, pulls: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in features]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    shares, _, indices, pulls, _ = others
    ctx.save_for_backward(shares, indices, pulls, *inputs[0])


def _differentiate(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[list[Tensor] | None, None, None]:
    shares, indices, pulls, *features = ctx.saved_tensors
    return None if upstream is None else _backward(upstream, features, shares, indices, pulls), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _valid_anchors(persons: Tensor) -> Tensor:
    ordered = persons.sort().values
    counts = torch.searchsorted(ordered, persons, right=True) - torch.searchsorted(ordered, persons)
    return (counts > 1) & (counts < len(persons))


def _mine(features: Sequence[Tensor], persons: Tensor, product_dtype: torch.dtype | None) -> list[Tensor]:
    """Farthest image of the anchor's person and nearest of another, (2, N) per head."""
    rows = max(1, BLOCK_ELEMENTS // len(persons))
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


def _noisy_distances(x: Tensor, chosen: Tensor, product_dtype: torch.dtype) -> Tensor:
    y = x[chosen]  # (2, N, D)
    product = (x.to(product_dtype).to(x.dtype) * y.to(product_dtype).to(x.dtype)).sum(2).to(product_dtype)
    square = x.square().sum(1) + y.square().sum(2) - 2 * product.to(x.dtype)
    return square.clamp_min(MIN_SQUARE).sqrt()


class _Distances(torch.autograd.Function):
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
