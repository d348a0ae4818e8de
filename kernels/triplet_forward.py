"""The forward kernel of `batch_hard_triplet`, all heads in one launch.

A program computes one tile of squares, which feeds the extremes of its rows and, being symmetric, of its columns.
Programs merge them by the atomic maximum of a key, which no order of arrival changes. Of all that touch a block of
anchors the last to arrive measures the two chosen distances of each as sqrt(|x - y|^2): only the order is taken from
the tiles. The last one of a head adds up its loss.
Heads may differ in width, stride and type: a program branches to the loads of its own head.

N images, D width of a head. The state of a head, all zero before: keys of the farthest positives (N,) and of the
nearest negatives (N,), 0 where none is seen; how many tiles of each block of anchors are done, how many blocks are.
"""

# Triton reads its own annotations.
import triton
import triton.language as tl

from fusionreid.kernels import triplet_tiles

# Squares are compared as the bits of a float32, which order as they do.
INFINITE = tl.constexpr(0x7F800000)
BROKEN = tl.constexpr(0x7F800001)  # NaN is the most extreme of all: it must reach the loss
LAST = tl.constexpr(0x7FFFFFFF)
LEAST = tl.constexpr(1e-12)  # of a square; below it nothing pulls


@triton.jit
def forward(xs, widths, strides, persons_ptr, state_ptr, terms_ptr, losses_ptr, shares_ptr, distances_ptr, indices_ptr,
            pulls_ptr, valid_ptr, N, margin, SOFT: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
            BLOCK_D: tl.constexpr):  # fmt: skip
    """Grid (tiles, heads) -> losses and shares (heads,), a share being 1 / valid anchors; distances, indices and pulls
    (2, heads, N), a pull being the derivative of an anchor's loss by a distance, over the distance; valid (N,)."""
    head, heads, blocks = tl.program_id(1), tl.num_programs(1), tl.cdiv(N, ROWS)
    first, last = triplet_tiles.place(tl.program_id(0), blocks)
    row, column = first * ROWS + tl.arange(0, ROWS), last * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS, ROWS), tl.float32)
    for i in tl.static_range(len(xs)):
        if head == i:
            squares = triplet_tiles.squares(xs[i], widths[i], strides[i], row, column, N, ROWS, SPLIT, BLOCK_D)
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
