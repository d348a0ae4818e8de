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
import triton.language as tl
from torch import Tensor

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
        forward_kernel[blocks * (blocks + 1) // 2, heads](
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
        backward_kernel[count, sum(triton.cdiv(x.shape[1], 256) for x in features)](
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


# Squares are compared as the bits of a float32, which order as they do.
INFINITE = tl.constexpr(0x7F800000)
BROKEN = tl.constexpr(0x7F800001)  # NaN is the most extreme of all: it must reach the loss
LAST = tl.constexpr(0x7FFFFFFF)
LEAST = tl.constexpr(1e-12)  # of a square; below it nothing pulls


@triton.jit
def forward_kernel(xs, widths, strides, persons_ptr, state_ptr, terms_ptr, losses_ptr, shares_ptr, distances_ptr,
                   indices_ptr, pulls_ptr, valid_ptr, N, margin, SOFT: tl.constexpr, ROWS: tl.constexpr,
                   SPLIT: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Grid (tiles, heads) -> losses and shares (heads,), a share being 1 / valid anchors; distances, indices and pulls
    (2, heads, N), a pull being the derivative of an anchor's loss by a distance, over the distance; valid (N,)."""
    head, heads, blocks = tl.program_id(1), tl.num_programs(1), tl.cdiv(N, ROWS)
    first, last = _place(tl.program_id(0), blocks)
    row, column = first * ROWS + tl.arange(0, ROWS), last * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS, ROWS), tl.float32)
    for i in tl.static_range(len(xs)):
        if head == i:
            squares = _squares(xs[i], widths[i], strides[i], row, column, N, ROWS, SPLIT, BLOCK_D)
    keys_ptr = state_ptr + head * (2 * N + blocks + 1)
    done_ptr = keys_ptr + 2 * N
    _merge(squares, row, column, persons_ptr, keys_ptr, N)
    tl.debug_barrier()
    for block in tl.range(first, last + 1, tl.maximum(last - first, 1)):  # both, once if they are one
        if tl.atomic_add(done_ptr + block, 1, sem="acq_rel", scope="gpu") == blocks - 1:
            anchor = block * ROWS + tl.arange(0, ROWS)
            positive, negative, valid = _chosen(keys_ptr, anchor, N)
            to_positive, to_negative = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
            for i in tl.static_range(len(xs)):
                if head == i:
                    to_positive, to_negative = _measure(xs[i], widths[i], strides[i], anchor, positive, negative, N,
                                                        ROWS, 4096 // ROWS)  # fmt: skip
            at, after = head * N + anchor, heads * N
            _finish(to_positive, to_negative, valid, margin, terms_ptr + at, distances_ptr + at, pulls_ptr + at, after,
                    anchor < N, SOFT)  # fmt: skip
            tl.store(indices_ptr + at, positive.to(tl.int64), mask=anchor < N)
            tl.store(indices_ptr + after + at, negative.to(tl.int64), mask=anchor < N)
            tl.store(valid_ptr + anchor, valid, mask=(anchor < N) & (head == 0))
            tl.debug_barrier()
            if tl.atomic_add(done_ptr + blocks, 1, sem="acq_rel", scope="gpu") == blocks - 1:
                _add_up(terms_ptr + head * N, losses_ptr + head, shares_ptr + head, N)


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
def _measure(x_ptr, width, stride, anchor, positive, negative, N, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """|x - y|^2 of the anchors and their two partners."""
    to_positive = tl.zeros((ROWS, BLOCK_D), tl.float32)
    to_negative = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in tl.range(0, width, BLOCK_D, num_stages=1):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        mask = (anchor < N)[:, None] & (d < width)
        x = tl.load(x_ptr + anchor.to(tl.int64)[:, None] * stride + d, mask=mask, other=0.0).to(tl.float32)
        p = x - tl.load(x_ptr + positive.to(tl.int64)[:, None] * stride + d, mask=mask, other=0.0).to(tl.float32)
        n = x - tl.load(x_ptr + negative.to(tl.int64)[:, None] * stride + d, mask=mask, other=0.0).to(tl.float32)
        to_positive += p * p
        to_negative += n * n
    return tl.sum(to_positive, 1), tl.sum(to_negative, 1)


@triton.jit
def _finish(to_positive, to_negative, valid, margin, term_ptr, distance_ptr, pull_ptr, after, mask,
            SOFT: tl.constexpr):  # fmt: skip
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
    tl.store(term_ptr, tl.where(valid, loss, -1.0), mask=mask)
    tl.store(distance_ptr, positive, mask=mask)
    tl.store(distance_ptr + after, negative, mask=mask)
    tl.store(pull_ptr, tl.where(valid & (to_positive >= LEAST), slope / positive, 0.0), mask=mask)
    tl.store(pull_ptr + after, tl.where(valid & (to_negative >= LEAST), slope / negative, 0.0), mask=mask)


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


GROUP = tl.constexpr(8)  # columns of tiles that are worked off together, so that L2 serves most of their loads


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
def _squares(x_ptr, width, stride, row, column, N, ROWS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """|x - y|^2 of a tile, not below 0. SPLIT warps share the width of a small tile, else they share a large one."""
    if SPLIT > 1:
        products, of_rows, of_columns = _split_products(x_ptr, width, stride, row, column, N, ROWS, SPLIT, BLOCK_D)
    else:
        products, of_rows, of_columns = _tiled_products(x_ptr, width, stride, row, column, N, ROWS, BLOCK_D)
    result = of_rows[:, None] + (of_columns[None, :] - 2 * products)
    return tl.where(result <= 0, 0.0, result)


@triton.jit
def _tiled_products(x_ptr, width, stride, row, column, N, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    products = tl.zeros((ROWS, ROWS), tl.float32)
    of_rows, of_columns = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    rows_ptr = x_ptr + row.to(tl.int64)[:, None] * stride
    columns_ptr = x_ptr + column.to(tl.int64)[:, None] * stride
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(rows_ptr + d, mask=(row < N)[:, None] & (d < width), other=0.0)  # [ROWS, BLOCK_D]
        y = tl.load(columns_ptr + d, mask=(column < N)[:, None] & (d < width), other=0.0)
        products += _products(x, tl.trans(y))
        of_rows += tl.sum(_square(x), 1)
        of_columns += tl.sum(_square(y), 1)
    return products, of_rows, of_columns


@triton.jit
def _split_products(x_ptr, width, stride, row, column, N, ROWS: tl.constexpr, SPLIT: tl.constexpr,
                    BLOCK_D: tl.constexpr):  # fmt: skip
    """The next step's loads are under way while a step computes: asynchronous copies would lie unswizzled."""
    products = tl.zeros((SPLIT, ROWS, ROWS), tl.float32)
    of_rows = tl.zeros((ROWS, SPLIT, BLOCK_D), tl.float32)
    of_columns = tl.zeros((ROWS, SPLIT, BLOCK_D), tl.float32)
    rows_ptr = x_ptr + row.to(tl.int64)[:, None, None] * stride
    columns_ptr = x_ptr + column.to(tl.int64)[:, None, None] * stride
    d = tl.arange(0, SPLIT)[None, :, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, None, :]
    x = tl.load(rows_ptr + d, mask=(row < N)[:, None, None] & (d < width), other=0.0)  # [ROWS, SPLIT, BLOCK_D]
    y = tl.load(columns_ptr + d, mask=(column < N)[:, None, None] & (d < width), other=0.0)
    for _ in tl.range(0, width, SPLIT * BLOCK_D, num_stages=1):
        d += SPLIT * BLOCK_D
        next_x = tl.load(rows_ptr + d, mask=(row < N)[:, None, None] & (d < width), other=0.0)
        next_y = tl.load(columns_ptr + d, mask=(column < N)[:, None, None] & (d < width), other=0.0)
        products += _products(tl.permute(x, (1, 0, 2)), tl.permute(y, (1, 2, 0)))
        of_rows += _square(x)
        of_columns += _square(y)
        x, y = next_x, next_y
    return tl.sum(products, 0), tl.sum(tl.sum(of_rows, 2), 1), tl.sum(tl.sum(of_columns, 2), 1)


@triton.jit
def _square(x):
    x = x.to(tl.float32)
    return x * x


@triton.jit
def _products(x, y):
    """x y to 2^-21. Of float32: three tf32 products; `tf32x3` takes 13 instructions to halve a value, this takes 5."""
    if x.dtype == tl.float32:
        large_x, large_y = _tf32(x), _tf32(y)
        products = tl.dot(_tf32(x - large_x), large_y, input_precision="tf32")
        products = tl.dot(large_x, _tf32(y - large_y), products, input_precision="tf32")
        products = tl.dot(large_x, large_y, products, input_precision="tf32")
    else:
        products = tl.dot(x, y)
    return products


@triton.jit
def _tf32(x):
    """Rounded to 11 significant bits."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def backward_kernel(xs, gradients, widths, strides, indices_ptr, pulls_ptr, upstream_ptr, upstream_stride, shares_ptr,
                    order_ptr, starts_ptr, N, SORTED: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
                    BLOCK_D: tl.constexpr):  # fmt: skip
    """Grid (N, blocks of all D): an image's gradient gathers its own pulls and those of all who chose it.

    Choices are numbered through: N of positives, N of negatives. Sorted, order (heads, 2 N) has them by the image that
    was chosen, whose first is at starts (heads, N + 1); else each program looks them all through.
    """
    block = tl.program_id(1)
    for head in tl.static_range(len(xs)):
        blocks = tl.cdiv(widths[head], BLOCK_D)
        if (block >= 0) & (block < blocks):
            scale = tl.load(upstream_ptr + head * upstream_stride).to(tl.float32) * tl.load(shares_ptr + head)
            _gather(xs[head], gradients[head], block, widths[head], strides[head], indices_ptr + head * N,
                           pulls_ptr + head * N, scale, len(xs) * N, order_ptr + head * 2 * N,
                           starts_ptr + head * (N + 1), N, SORTED, BLOCK_E, CHUNK, BLOCK_D)  # fmt: skip
        block -= blocks


@triton.jit
def _gather(x_ptr, gradient_ptr, block, width, stride, indices_ptr, pulls_ptr, scale, after, order_ptr,
                   starts_ptr, N, SORTED: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
                   BLOCK_D: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row.to(tl.int64) * stride + d, mask=d < width, other=0.0).to(tl.float32)
    gradient = _own(x_ptr, x, row, d, width, stride, indices_ptr, pulls_ptr)
    gradient -= _own(x_ptr, x, row, d, width, stride, indices_ptr + after, pulls_ptr + after)
    if SORTED:
        stop = tl.load(starts_ptr + row + 1)
        for start in tl.range(tl.load(starts_ptr + row), stop, CHUNK):
            at = start + tl.arange(0, CHUNK)
            choice = tl.load(order_ptr + at, mask=at < stop, other=0).to(tl.int32)
            gradient += _pulls(x_ptr, x, choice, at < stop, d, width, stride, pulls_ptr, after, N)
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
                gradient += _pulls(x_ptr, x, found, wanted <= number, d, width, stride, pulls_ptr, after, N)
    tl.store(gradient_ptr + row.to(tl.int64) * width + d, scale * gradient, mask=d < width)


@triton.jit
def _own(x_ptr, x, row, d, width, stride, indices_ptr, pulls_ptr):
    pull = tl.load(pulls_ptr + row)
    y = tl.load(x_ptr + tl.load(indices_ptr + row) * stride + d, mask=d < width, other=0.0).to(tl.float32)
    return tl.where(pull == 0, 0.0, pull * (x - y))


@triton.jit
def _pulls(x_ptr, x, choice, mask, d, width, stride, pulls_ptr, after, N):
    """What some choices [CHUNK] add to the gradient of the image that was chosen, [BLOCK_D]."""
    nearest = choice >= N
    anchor = tl.where(nearest, choice - N, choice)
    pull = tl.load(pulls_ptr + tl.where(nearest, anchor + after, anchor), mask=mask, other=0.0)
    pull = tl.where(nearest, -pull, pull)[:, None]
    y = tl.load(x_ptr + anchor.to(tl.int64)[:, None] * stride + d[None, :],
                mask=(pull != 0) & (d < width)[None, :], other=0.0).to(tl.float32)  # fmt: skip
    return tl.sum(tl.where(pull == 0, 0.0, pull * (x[None, :] - y)), 0)
