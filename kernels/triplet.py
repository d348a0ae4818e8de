"""Batch-hard triplet loss over all heads:  loss = mean_a softplus(d(a, p) - d(a, n)).

With a margin, max(0, d(a, p) - d(a, n) + margin) in place of the softplus. p is the farthest image of the anchor's
person (the anchor itself is one of them), n the nearest image of another person, d(x, y) = sqrt(max(|x - y|^2, 1e-12)).
Mined block by block without a graph, from products relative to a centre; only the 2N chosen pairs are measured, as
|x - y|, and differentiated:  dloss/dx sums pull * (x - y) over the pairs that x is part of, pull = dloss/dd / d.
Source: Hermans et al., In Defense of the Triplet Loss, arXiv:1703.07737. N images, D width of a head.
"""

# Triton reads its own annotations.
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusionreid.kernels._path import capability, on_device_of, use_triton
from fusionreid.kernels._triplet_torch import MIN_SQUARE, Loss, noisy_loss

SMALL = 1024  # images of a batch that is mined in small tiles, which spread it over all multiprocessors
HALF_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

GROUP = tl.constexpr(8)  # columns of tiles that are worked off together, so that L2 serves most of their loads
# Squares are compared as the bits of a float32, which order as they do.
INFINITE = tl.constexpr(0x7F800000)
BROKEN = tl.constexpr(0x7F800001)  # NaN is the most extreme of all: it must reach the loss
LAST = tl.constexpr(0x7FFFFFFF)
LEAST = tl.constexpr(MIN_SQUARE)  # of a square; below it nothing pulls

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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
    """Mine the hardest pairs of every head's features (N, D) and take the losses, in fp32 at least.

    Persons (N,) are integers. `margin=None` is the soft margin; with normalize, features are brought to unit length.
    `product_dtype` rounds inputs and result of the inner products in |x|^2 + |y|^2 - 2 x y, as the published code does
    under mixed precision; with norms of 30 to 90 its distances are mostly rounding noise. For comparison only.
    A square that overflows fp32, of images more than 1e19 apart, makes the loss infinite or NaN, as NaN features do.
    ValueError if shapes, types or devices do not fit.
    """
    _check(features, persons, margin, product_dtype)
    if normalize:
        features = [_normalized(x) for x in features]
    if product_dtype is not None:
        losses, distances, indices, valid = noisy_loss(features, persons, margin, product_dtype)
    elif all(use_triton(x) for x in features):
        losses, _, pairs, indices, valid = _Loss.apply(persons, margin, *_rows(features))
        distances = pairs[:2]
    else:
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in features)
        losses, distances, indices, valid = Loss.apply(persons, margin, wanted, *features)
    (to_positive, to_negative), (positive, negative) = distances.unbind(), indices.unbind()
    return BatchHard(losses, to_positive, to_negative, positive, negative, valid)


def _check(
    features: Sequence[Tensor], persons: Tensor, margin: float | None, product_dtype: torch.dtype | None
) -> None:
    if not features or persons.ndim != 1 or len(persons) == 0 or persons.is_floating_point():
        raise ValueError(
            f"batch_hard_triplet: needs one head or more and integer persons (N,) of one image or more, got "
            f"{len(features)} heads and persons {tuple(persons.shape)} {persons.dtype}"
        )
    for head, x in enumerate(features):
        if x.ndim != 2 or len(x) != len(persons) or not x.numel() or not x.is_floating_point():
            raise ValueError(
                f"batch_hard_triplet: features must be floating (N, D), D > 0, with N = {len(persons)} persons, "
                f"got {tuple(x.shape)} {x.dtype} in head {head}"
            )
        if x.device != persons.device:
            raise ValueError(f"batch_hard_triplet: head {head} is on {x.device}, persons are on {persons.device}")
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"batch_hard_triplet: margin must be finite, or None for the soft margin, got {margin}")
    if product_dtype is not None and not product_dtype.is_floating_point:
        raise ValueError(f"batch_hard_triplet: product_dtype must be a floating type, got {product_dtype}")


def _normalized(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / (x.norm(dim=1, keepdim=True) + 1e-12)


def _rows(features: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous rows in float32 and at most one half precision, which is what the kernels take."""
    types = {torch.float32, next((x.dtype for x in features if x.dtype in HALF_TYPES), torch.float32)}
    rows = [x if x.dtype in types else x.float() for x in features]
    return [x if x.stride(1) == 1 else x.contiguous() for x in rows]


class _Loss(torch.autograd.Function):
    """Joins the two custom ops; `torch.library`'s own way to do so costs three times as much per call."""

    @staticmethod
    def forward(ctx: Any, persons: Tensor, margin: float | None, *features: Tensor) -> Outputs:
        losses, shares, pairs, indices, valid = _forward(features, persons, margin)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(shares, pairs, indices, valid)
        ctx.save_for_backward(shares, pairs, indices, *features)
        return losses, shares, pairs, indices, valid

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        shares, pairs, indices, *features = ctx.saved_tensors
        if upstream is None:
            return (None,) * (2 + len(features))
        return None, None, *_backward(upstream, features, shares, pairs, indices)


@torch.library.custom_op("fusionreid::batch_hard_triplet_forward", mutates_args=())
def _forward(features: Sequence[Tensor], persons: Tensor, margin: float | None) -> Outputs:
    """losses and shares (heads,), a share being 1 / valid anchors; pairs (5, heads, N); indices (2, heads, N); valid.

    Pairs: distances to the positive and the negative, their pulls, and the anchor's loss, -1 if it is not valid. A pull
    is the derivative of an anchor's loss by a distance, over the distance.
    """
    losses, shares, pairs, indices, valid = outputs = _forward_outputs(features, persons, margin)
    heads, count = len(features), len(persons)
    with on_device_of(persons):
        settings = _tiles(count)
        blocks = triton.cdiv(count, settings["ROWS"])
        parts, norms = None, None
        if count > SMALL:  # large tiles have no registers to spare for 64 bits of a person
            persons = torch.searchsorted(persons.sort().values, persons, out_int32=True)
            parts, norms = _split(features, settings["BLOCK_D"])
        state = indices.new_zeros(heads, 2 * count + blocks + 1)
        forward_kernel[blocks * (blocks + 1) // 2, heads](
            *_heads(features), parts, norms, persons.contiguous(), state, losses, shares, pairs, indices, valid, count,
            0.0 if margin is None else margin, **_types(features), SOFT=margin is None, **settings,
        )  # fmt: skip
    return outputs


@_forward.register_fake
def _forward_outputs(features: Sequence[Tensor], persons: Tensor, margin: float | None) -> Outputs:
    losses, shares = (persons.new_empty(len(features), dtype=torch.float32) for _ in range(2))
    pairs = losses.new_empty(5, len(features), len(persons))
    indices = persons.new_empty(2, len(features), len(persons), dtype=torch.int64)
    return losses, shares, pairs, indices, persons.new_empty(len(persons), dtype=torch.bool)


def _tiles(count: int) -> dict[str, int]:
    """A small batch spreads over all multiprocessors, the warps of a program share the width; a large one reuses loads.

    The largest tiles that spill nothing, as compiled by Triton 3.6 to 3.8; not timed.
    """
    if count <= SMALL:
        return {"ROWS": 16, "SPLIT": 8, "BLOCK_D": 32, "num_warps": 8}
    if capability() == 90:
        return {"ROWS": 128, "SPLIT": 1, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
    return {"ROWS": 64, "SPLIT": 1, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3}


def _heads(features: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...]]:
    return tuple(features), tuple(x.shape[1] for x in features), tuple(x.stride(0) for x in features)


def _types(features: Sequence[Tensor]) -> dict[str, Any]:
    """Which heads are float32, and the type of the others."""
    half = next((x.dtype for x in features if x.dtype != torch.float32), torch.float16)
    return {"WIDE": tuple(x.dtype == torch.float32 for x in features), "HALF": HALF_TYPES[half]}


def _split(features: Sequence[Tensor], block: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Parts (2, N, width padded to blocks) of every head and norms (heads, 2, N): see `split_kernel`."""
    count, parts = len(features[0]), []
    norms = features[0].new_empty(len(features), 2, count, dtype=torch.float32)
    for x, norm in zip(features, norms):
        padded = triton.cdiv(x.shape[1], block) * block
        parts.append(x.new_empty(2, count, padded, dtype=torch.float16))
        split_kernel[(triton.cdiv(count, 4),)](
            *_heads([x]), parts[-1], norm, count, padded, **_types([x]), ROWS=4, BLOCK=256, num_warps=4
        )
    return tuple(parts), norms


@torch.library.custom_op("fusionreid::batch_hard_triplet_backward", mutates_args=())
def _backward(
    upstream: Tensor, features: Sequence[Tensor], shares: Tensor, pairs: Tensor, indices: Tensor
) -> list[Tensor]:
    """The gradient of every head, given that of its loss (heads,)."""
    gradients = [x.new_empty(x.shape) for x in features]
    _, heads, count = indices.shape
    order = starts = None
    if count > SMALL:
        chosen, order = indices.transpose(0, 1).reshape(heads, 2 * count).sort(stable=True)
        starts = torch.searchsorted(chosen, torch.arange(count + 1, device=chosen.device).repeat(heads, 1))
    with on_device_of(indices):
        backward_kernel[count, sum(triton.cdiv(x.shape[1], 256) for x in features)](
            *_heads(features), tuple(gradients), indices, pairs, upstream, upstream.stride(0), shares, order, starts,
            count, **_types(features), BLOCK_E=256, CHUNK=4, BLOCK_D=256, num_warps=1,
        )  # fmt: skip
    return gradients


@_backward.register_fake
def _(upstream: Tensor, features: Sequence[Tensor], shares: Tensor, pairs: Tensor, indices: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in features]


@triton.jit
def forward_kernel(xs, widths, strides, parts, norms_ptr, persons_ptr, state_ptr, losses_ptr, shares_ptr, pairs_ptr,
                   indices_ptr, valid_ptr, N, margin, WIDE: tl.constexpr, HALF: tl.constexpr, SOFT: tl.constexpr,
                   ROWS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Grid (tiles of the upper triangle, heads): mine all pairs, measure the chosen ones, take the mean.

    A program computes one tile of squares, which feeds the extremes of its rows and, being symmetric, of its columns.
    Programs merge them by the atomic maximum of a key, which no order of arrival changes. Of all that touch a block of
    anchors the last to arrive measures the two chosen distances of each; the last one of a head adds up its loss.

    The state of a head, all zero before: keys of the farthest positives (N,) and of the nearest negatives (N,), 0
    where none is seen; how many tiles of each block of anchors are done; how many blocks are.
    """
    head, heads, blocks = tl.program_id(1), tl.num_programs(1), tl.cdiv(N, ROWS)
    x = _head(xs, widths, strides, WIDE, head)
    first, last = _place(tl.program_id(0), blocks)
    row, column = first * ROWS + tl.arange(0, ROWS), last * ROWS + tl.arange(0, ROWS)
    if SPLIT > 1:
        squares = _squares_in_small_tiles(x, row, column, N, HALF, ROWS, SPLIT, BLOCK_D)
    else:
        squares = _squares_of_parts(_pick(parts, head), norms_ptr + head * 2 * N, x[2], row, column, N, ROWS, BLOCK_D)
    keys_ptr = state_ptr + head * (2 * N + blocks + 1)
    done_ptr = keys_ptr + 2 * N
    _merge(squares, row, column, persons_ptr, keys_ptr, N)
    tl.debug_barrier()
    for block in tl.range(first, last + 1, tl.maximum(last - first, 1)):  # both, once if they are one
        if tl.atomic_add(done_ptr + block, 1, sem="acq_rel", scope="gpu") == blocks - 1:
            anchor = block * ROWS + tl.arange(0, ROWS)
            positive, negative, valid = _chosen(keys_ptr, anchor, N)
            to_positive, to_negative = _measure(x, anchor, positive, negative, N, HALF, ROWS, 32 * SPLIT)
            at, after = head * N + anchor, heads * N
            _finish(to_positive, to_negative, valid, margin, pairs_ptr + at, after, anchor < N, SOFT)
            tl.store(indices_ptr + at, positive.to(tl.int64), mask=anchor < N)
            tl.store(indices_ptr + after + at, negative.to(tl.int64), mask=anchor < N)
            tl.store(valid_ptr + anchor, valid, mask=(anchor < N) & (head == 0))
            tl.debug_barrier()
            if tl.atomic_add(done_ptr + blocks, 1, sem="acq_rel", scope="gpu") == blocks - 1:
                _add_up(pairs_ptr + 4 * after + head * N, losses_ptr + head, shares_ptr + head, N)


@triton.jit
def _head(xs, widths, strides, WIDE: tl.constexpr, head):
    """The features of a head for `_load`: pointer to float32, whether they are float32, width, stride.

    Chosen among those of all heads, so that one copy of the code that loads them serves every head.
    """
    pointer = xs[0].to(tl.pointer_type(tl.float32))
    for i in tl.static_range(1, len(xs)):
        pointer = tl.where(head == i, xs[i].to(tl.pointer_type(tl.float32)), pointer)
    return pointer, _pick(WIDE, head), _pick(widths, head), _pick(strides, head)


@triton.jit
def _pick(values, head):
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(head == i, values[i], value)
    return value


@triton.jit
def _load(x, row, d, mask, HALF: tl.constexpr):
    """Features of a head in float32, 0 outside of it."""
    at, mask = tl.cast(row, tl.int64) * x[3] + d, mask & (d < x[2])
    if x[1]:
        values = tl.load(x[0] + at, mask=mask, other=0.0)
    else:
        values = tl.load(x[0].to(tl.pointer_type(HALF)) + at, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _centre(x, d, N, HALF: tl.constexpr):
    """The median of three images, coordinate by coordinate, 0 where it is not finite.

    Squares come from |x|^2 + |y|^2 - 2 x y, which cancels where all images lie far from 0 and close together: so they
    are taken relative to a point among the images, which one outlier does not move.
    """
    a, b, c = _load(x, 0, d, d >= 0, HALF), _load(x, N // 2, d, d >= 0, HALF), _load(x, N - 1, d, d >= 0, HALF)
    centre = tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))
    return tl.where(tl.abs(centre) < float("inf"), centre, 0.0)


@triton.jit
def _place(tile, blocks):
    """Row and column of a tile of the upper triangle, column group by column group, each row by row."""
    group = _root(tile) // GROUP * GROUP  # its first column; before it lie all tiles of the columns before it
    tile -= group * (group + 1) // 2
    columns = tl.minimum(GROUP, blocks - group)
    square = group * columns  # tiles above the group's own triangle
    corner = tl.maximum(tile - square, 0)
    column = _root(corner)
    inside = tile < square
    row = tl.where(inside, tile // columns, group + corner - column * (column + 1) // 2)
    return row, group + tl.where(inside, tile % columns, column)


@triton.jit
def _root(tile):
    """The largest n with n (n + 1) / 2 <= tile, which is a column: its tiles have the numbers from there on."""
    n = ((tl.sqrt_rn(8.0 * tile.to(tl.float32) + 1) - 1) / 2).to(tl.int32)
    n -= (n * (n + 1) // 2 > tile).to(tl.int32)
    return n + ((n + 1) * (n + 2) // 2 <= tile).to(tl.int32)


@triton.jit
def _squares_in_small_tiles(x_head, row, column, N, HALF: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
                            BLOCK_D: tl.constexpr):  # fmt: skip
    """|x - y|^2 of a tile, not below 0; SPLIT warps share the width.

    The next step's loads are under way while a step computes: asynchronous copies would lie unswizzled.
    """
    products = tl.zeros((SPLIT, ROWS, ROWS), tl.float32)
    of_rows = tl.zeros((ROWS, SPLIT, BLOCK_D), tl.float32)
    of_columns = tl.zeros((ROWS, SPLIT, BLOCK_D), tl.float32)
    row, column = row[:, None, None], column[:, None, None]
    d = tl.arange(0, SPLIT)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # a centre in 3-D would set x's layout
    x = _load(x_head, row, d[None, :, :], row < N, HALF)  # [ROWS, SPLIT, BLOCK_D]
    y = _load(x_head, column, d[None, :, :], column < N, HALF)
    centre = _centre(x_head, d, N, HALF)[None, :, :]
    for _ in tl.range(0, x_head[2], SPLIT * BLOCK_D, num_stages=1):
        d += SPLIT * BLOCK_D
        next_x = _load(x_head, row, d[None, :, :], row < N, HALF)
        next_y = _load(x_head, column, d[None, :, :], column < N, HALF)
        next_centre = _centre(x_head, d, N, HALF)[None, :, :]
        x -= centre
        y -= centre
        products += _products(tl.permute(x, (1, 0, 2)), tl.permute(y, (1, 2, 0)))
        of_rows += x * x
        of_columns += y * y
        x, y, centre = next_x, next_y, next_centre
    of_rows, of_columns = tl.sum(tl.sum(of_rows, 2), 1), tl.sum(tl.sum(of_columns, 2), 1)
    result = of_rows[:, None] + (of_columns[None, :] - 2 * tl.sum(products, 0))
    return tl.where(result <= 0, 0.0, result)


@triton.jit
def _products(x, y):
    """x y to 2^-21 by three tf32 products; `tf32x3` takes 13 instructions to halve a value, this takes 5."""
    large_x, large_y = _tf32(x), _tf32(y)
    products = tl.dot(_tf32(x - large_x), large_y, input_precision="tf32")
    products = tl.dot(large_x, _tf32(y - large_y), products, input_precision="tf32")
    return tl.dot(large_x, large_y, products, input_precision="tf32")


@triton.jit
def _tf32(x):
    """Rounded to 11 significant bits."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def split_kernel(xs, widths, strides, parts_ptr, norms_ptr, N, padded, WIDE: tl.constexpr, HALF: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid (blocks of rows,): x - centre = (high + low) * step to 2^-22, in float16, the step a power of two.

    Parts (2, N, padded): high and low, 0 past the width; norms (2, N): |x - centre|^2 and the step.
    """
    head, row = _head(xs, widths, strides, WIDE, 0), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    highest, squares = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, padded, BLOCK):
        d = start + tl.arange(0, BLOCK)[None, :]
        x = _load(head, row[:, None], d, (row < N)[:, None], HALF) - _centre(head, d, N, HALF)
        squares += x * x
        highest = tl.maximum(highest, tl.abs(x))
    exponent = tl.max(highest, 1).to(tl.int32, bitcast=True) >> 23
    factor = tl.minimum(268 - exponent, 252)  # brings the highest value into 2^14..2^15
    step = ((254 - factor) << 23).to(tl.float32, bitcast=True)
    factor = (factor << 23).to(tl.float32, bitcast=True)
    tl.store(norms_ptr + row, tl.sum(squares, 1), mask=row < N)
    tl.store(norms_ptr + N + row, step, mask=row < N)
    parts_ptr += row.to(tl.int64)[:, None] * padded
    for start in tl.range(0, padded, BLOCK):
        d = start + tl.arange(0, BLOCK)[None, :]
        x = _load(head, row[:, None], d, (row < N)[:, None], HALF) - _centre(head, d, N, HALF)
        x *= factor[:, None]
        high, mask = x.to(tl.float16), (row < N)[:, None] & (d < padded)
        tl.store(parts_ptr + d, high, mask=mask)
        tl.store(parts_ptr + N.to(tl.int64) * padded + d, (x - high.to(tl.float32)).to(tl.float16), mask=mask)


@triton.jit
def _squares_of_parts(parts_ptr, norms_ptr, width, row, column, N, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """|x - y|^2 of a large tile, not below 0, from the rows that `split_kernel` leaves."""
    products = tl.zeros((ROWS, ROWS), tl.float32)
    padded = tl.cdiv(width, BLOCK_D) * BLOCK_D
    low = N.to(tl.int64) * padded
    x_ptr = parts_ptr + tl.minimum(row, N - 1).to(tl.int64)[:, None] * padded + tl.arange(0, BLOCK_D)[None, :]
    y_ptr = parts_ptr + tl.minimum(column, N - 1).to(tl.int64)[:, None] * padded + tl.arange(0, BLOCK_D)[None, :]
    for _ in tl.range(0, padded, BLOCK_D):
        high_x, low_x = tl.load(x_ptr), tl.load(x_ptr + low)  # [ROWS, BLOCK_D]
        high_y, low_y = tl.trans(tl.load(y_ptr)), tl.trans(tl.load(y_ptr + low))
        products = tl.dot(low_x, high_y, products)
        products = tl.dot(high_x, low_y, products)
        products = tl.dot(high_x, high_y, products)
        x_ptr += BLOCK_D
        y_ptr += BLOCK_D
    row, column = tl.minimum(row, N - 1), tl.minimum(column, N - 1)
    products = products * tl.load(norms_ptr + N + row)[:, None] * tl.load(norms_ptr + N + column)[None, :]
    result = tl.load(norms_ptr + row)[:, None] + (tl.load(norms_ptr + column)[None, :] - 2 * products)
    return tl.where(result <= 0, 0.0, result)


@triton.jit
def _merge(squares, row, column, persons_ptr, keys_ptr, N):
    person = tl.load(persons_ptr + row, mask=row < N, other=0)
    other = tl.load(persons_ptr + column, mask=column < N, other=0)
    inside = (row < N)[:, None] & (column < N)[None, :]
    same = person[:, None] == other[None, :]
    positive = inside & same & (row[:, None] != column[None, :])
    negative = inside & (person[:, None] != other[None, :])
    bits = tl.where(squares != squares, BROKEN, squares.to(tl.int32, bitcast=True))
    ranks = tl.where(positive, bits, -1)
    tl.atomic_max(keys_ptr + row, _keys(ranks, column[None, :], 1), mask=row < N, sem="relaxed")
    tl.atomic_max(keys_ptr + column, _keys(ranks, row[:, None], 0), mask=column < N, sem="relaxed")
    ranks = tl.where(negative, tl.where(bits == BROKEN, BROKEN, -bits + INFINITE), -1)
    tl.atomic_max(keys_ptr + N + row, _keys(ranks, column[None, :], 1), mask=row < N, sem="relaxed")
    tl.atomic_max(keys_ptr + N + column, _keys(ranks, row[:, None], 0), mask=column < N, sem="relaxed")


@triton.jit
def _keys(ranks, places, AXIS: tl.constexpr):
    """The largest rank along an axis above the lowest place that has it, inverted; 0 where all ranks are negative."""
    best = tl.max(ranks, AXIS)
    place = tl.min(tl.where(ranks == tl.expand_dims(best, AXIS), places, LAST), AXIS)
    return tl.where(best < 0, 0, (best.to(tl.int64) << 32) | (place ^ LAST).to(tl.int64))


@triton.jit
def _chosen(keys_ptr, anchor, N):
    """Farthest positive, itself unless another is farther than 0; nearest negative, the first image without any."""
    far = tl.load(keys_ptr + anchor, mask=anchor < N, other=0)
    near = tl.load(keys_ptr + N + anchor, mask=anchor < N, other=0)
    itself = (anchor ^ LAST).to(tl.int64)
    positive = tl.where(far > itself, far, itself).to(tl.int32) ^ LAST
    return positive, tl.where(near == 0, 0, near.to(tl.int32) ^ LAST), (far != 0) & (near != 0)


@triton.jit
def _measure(x_head, anchor, positive, negative, N, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """|x - y|^2 of the anchors and their two partners; the next step's loads are under way while a step computes."""
    to_positive = tl.zeros((ROWS, BLOCK_D), tl.float32)
    to_negative = tl.zeros((ROWS, BLOCK_D), tl.float32)
    anchor, positive, negative = anchor[:, None], positive[:, None], negative[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    x = _load(x_head, anchor, d, anchor < N, HALF)
    p, n = _load(x_head, positive, d, anchor < N, HALF), _load(x_head, negative, d, anchor < N, HALF)
    for _ in tl.range(0, x_head[2], BLOCK_D, num_stages=1):
        d += BLOCK_D
        next_x = _load(x_head, anchor, d, anchor < N, HALF)
        next_p, next_n = _load(x_head, positive, d, anchor < N, HALF), _load(x_head, negative, d, anchor < N, HALF)
        to_positive += (x - p) * (x - p)
        to_negative += (x - n) * (x - n)
        x, p, n = next_x, next_p, next_n
    return tl.sum(to_positive, 1), tl.sum(to_negative, 1)


@triton.jit
def _finish(to_positive, to_negative, valid, margin, pair_ptr, after, mask, SOFT: tl.constexpr):
    """Distances, pulls and loss of anchors from their two squares."""
    positive = tl.sqrt_rn(tl.where(to_positive < LEAST, LEAST, to_positive))
    negative = tl.sqrt_rn(tl.where(to_negative < LEAST, LEAST, to_negative))
    gap = positive - negative
    if SOFT:
        small = tl.exp(-tl.abs(gap))
        one_more = 1 + small  # log(1 + small) without losing a small one to the rounding of the sum
        rest = tl.where(one_more == 1, small, tl.log(one_more) * small / tl.where(one_more == 1, 1.0, one_more - 1))
        loss = tl.where(gap < 0, 0.0, gap) + rest
        slope = tl.where(gap < 0, small, 1.0) / one_more
    else:
        loss = gap + margin
        slope = tl.where(loss < 0, 0.0, 1.0)
        loss = tl.where(loss < 0, 0.0, loss)
    tl.store(pair_ptr, positive, mask=mask)
    tl.store(pair_ptr + after, negative, mask=mask)
    tl.store(pair_ptr + 2 * after, tl.where(valid & (to_positive >= LEAST), slope / positive, 0.0), mask=mask)
    tl.store(pair_ptr + 3 * after, tl.where(valid & (to_negative >= LEAST), slope / negative, 0.0), mask=mask)
    tl.store(pair_ptr + 4 * after, tl.where(valid, loss, -1.0), mask=mask)


@triton.jit
def _add_up(terms_ptr, loss_ptr, share_ptr, N, BLOCK_N: tl.constexpr = 1024):
    """The mean of the terms, but for the negative ones of anchors that are not valid."""
    sums, anchors = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.int32)
    for start in tl.range(0, N, BLOCK_N):
        term = tl.load(terms_ptr + start + tl.arange(0, BLOCK_N), mask=start + tl.arange(0, BLOCK_N) < N, other=-1.0)
        sums += tl.where(term < 0, 0.0, term)
        anchors += tl.where(term < 0, 0, 1)
    share = 1.0 / tl.maximum(tl.sum(anchors, 0), 1).to(tl.float32)
    tl.store(loss_ptr, tl.sum(sums, 0) * share)
    tl.store(share_ptr, share)


@triton.jit
def backward_kernel(xs, widths, strides, gradients, indices_ptr, pairs_ptr, upstream_ptr, upstream_stride, shares_ptr,
                    order_ptr, starts_ptr, N, WIDE: tl.constexpr, HALF: tl.constexpr, BLOCK_E: tl.constexpr,
                    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Grid (N, blocks of all D): an image's gradient gathers its own pulls and those of all who chose it.

    So no order of arrival matters. Choices are numbered through: N of positives, N of negatives. If given, order
    (heads, 2 N) has them by the image that was chosen, whose first is at starts (heads, N + 1); else each program looks
    them all through.
    """
    row, block, head = tl.program_id(0), tl.program_id(1), 0
    for i in tl.static_range(len(xs) - 1):
        blocks = tl.cdiv(widths[i], BLOCK_D)
        beyond = (head == i) & (block >= blocks)
        head, block = tl.where(beyond, i + 1, head), tl.where(beyond, block - blocks, block)
    x_head, after = _head(xs, widths, strides, WIDE, head), len(xs) * N
    indices_ptr += head * N
    pulls_ptr = pairs_ptr + 2 * after + head * N
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    x = _load(x_head, row, d, d >= 0, HALF)
    gradient = _own(x_head, x, row, d, indices_ptr, pulls_ptr, HALF)
    gradient -= _own(x_head, x, row, d, indices_ptr + after, pulls_ptr + after, HALF)
    if order_ptr is not None:
        starts_ptr += head * (N + 1) + row
        stop = tl.load(starts_ptr + 1)
        for start in tl.range(tl.load(starts_ptr), stop, CHUNK):
            at = start + tl.arange(0, CHUNK)
            choice = tl.load(order_ptr + head * 2 * N + at, mask=at < stop, other=0).to(tl.int32)
            gradient += _pulls(x_head, x, choice, at < stop, d, pulls_ptr, after, N, HALF)
    else:
        for start in tl.range(0, 2 * N, BLOCK_E):
            choice = start + tl.arange(0, BLOCK_E)
            at = tl.where(choice < N, choice, choice - N + after)
            chose = (tl.load(indices_ptr + at, mask=choice < 2 * N, other=-1) == row).to(tl.int32)
            place = tl.cumsum(chose, 0)
            number = tl.max(place, 0)
            place *= chose  # from 1 on, among the choices of this image
            for done in tl.range(0, number, CHUNK):
                wanted = done + 1 + tl.arange(0, CHUNK)
                found = tl.sum(tl.where(place[None, :] == wanted[:, None], choice[None, :], 0), 1)
                gradient += _pulls(x_head, x, found, wanted <= number, d, pulls_ptr, after, N, HALF)
    gradient *= tl.load(upstream_ptr + head * upstream_stride).to(tl.float32) * tl.load(shares_ptr + head)
    pointer, wide, width, _ = _head(gradients, widths, strides, WIDE, head)
    at = row.to(tl.int64) * width + d
    if wide:
        tl.store(pointer + at, gradient, mask=d < width)
    else:
        tl.store(pointer.to(tl.pointer_type(HALF)) + at, gradient, mask=d < width)


@triton.jit
def _own(x_head, x, row, d, indices_ptr, pulls_ptr, HALF: tl.constexpr):
    pull = tl.load(pulls_ptr + row)
    y = _load(x_head, tl.load(indices_ptr + row), d, d >= 0, HALF)
    return tl.where(pull == 0, 0.0, pull * (x - y))


@triton.jit
def _pulls(x_head, x, choice, mask, d, pulls_ptr, after, N, HALF: tl.constexpr):
    """The share of some choices [CHUNK] in the gradient of the image that was chosen, [BLOCK_D]."""
    nearest = choice >= N
    anchor = tl.where(nearest, choice - N, choice)
    pull = tl.load(pulls_ptr + tl.where(nearest, anchor + after, anchor), mask=mask, other=0.0)
    pull = tl.where(nearest, -pull, pull)[:, None]
    y = _load(x_head, anchor[:, None], d[None, :], pull != 0, HALF)
    return tl.sum(tl.where(pull == 0, 0.0, pull * (x[None, :] - y)), 0)
