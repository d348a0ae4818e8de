"""The Triton kernels of `batch_hard_triplet`, all heads in one launch each: mine, measure, differentiate.

Mining compares |y|^2 - 2 x y, which orders the columns y of a row x as |x - y|^2 does; the products are of float32
grade, and only the order is taken from them. The two chosen distances are measured afterwards as sqrt(|x - y|^2).
Heads may differ in width, stride and type: a program branches once, to the code of its own head.

N images, D width of a head, S parts of the columns that are searched by different programs.
"""

# Triton reads its own annotations.
import triton
import triton.language as tl


@triton.jit
def mine(xs, widths, strides, persons_ptr, extremes_ptr, chosen_ptr, same_ptr, N, columns,
         S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Grid (row blocks, S, heads) -> extremes and chosen (2, heads, N, S): per part the largest score and its column
    among the person's own images, the smallest among the others; same (N, S): how many are the person's own."""
    for head in tl.static_range(len(xs)):
        if tl.program_id(2) == head:
            at = head * N * S
            after = len(xs) * N * S
            _mine(xs[head], widths[head], strides[head], persons_ptr, extremes_ptr + at, chosen_ptr + at, same_ptr,
                  after, N, columns, head == 0, S, ROWS, COLUMNS, BLOCK_D)  # fmt: skip


@triton.jit
def _mine(x_ptr, width, stride, persons_ptr, extremes_ptr, chosen_ptr, same_ptr, after, N, columns,
          COUNT: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
          BLOCK_D: tl.constexpr):  # fmt: skip
    part = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    person = tl.load(persons_ptr + row, mask=row < N, other=0)
    farthest = tl.full((ROWS,), float("-inf"), tl.float32)
    nearest = tl.full((ROWS,), float("inf"), tl.float32)
    positive = tl.zeros((ROWS,), tl.int32)
    negative = tl.zeros((ROWS,), tl.int32)
    count = tl.zeros((ROWS,), tl.int32)
    for start in tl.range(part * columns, tl.minimum((part + 1) * columns, N), COLUMNS, num_stages=1):
        column = start + tl.arange(0, COLUMNS)
        scores = _scores(x_ptr, row, column, width, stride, N, ROWS, COLUMNS, BLOCK_D)
        other = tl.load(persons_ptr + column, mask=column < N, other=0)
        same = (person[:, None] == other[None, :]) & (column < N)[None, :]
        different = (person[:, None] != other[None, :]) & (column < N)[None, :]
        count += tl.sum(same.to(tl.int32), 1)
        broken = scores != scores  # NaN is the most extreme of all: it must reach the loss
        score = tl.where(same, tl.where(broken, float("inf"), scores), float("-inf"))
        value = tl.max(score, 1)
        place = tl.min(tl.where(score == value[:, None], column[None, :], N), 1)
        better = value > farthest  # a later column with the same score does not replace an earlier one
        farthest, positive = tl.where(better, value, farthest), tl.where(better, place, positive)
        score = tl.where(different, tl.where(broken, float("-inf"), scores), float("inf"))
        value = tl.min(score, 1)
        place = tl.min(tl.where(score == value[:, None], column[None, :], N), 1)
        better = value < nearest
        nearest, negative = tl.where(better, value, nearest), tl.where(better, place, negative)
    at = row.to(tl.int64) * S + part
    tl.store(extremes_ptr + at, farthest, mask=row < N)
    tl.store(extremes_ptr + after + at, nearest, mask=row < N)
    tl.store(chosen_ptr + at, positive, mask=row < N)
    tl.store(chosen_ptr + after + at, negative, mask=row < N)
    if COUNT:
        tl.store(same_ptr + at, count, mask=row < N)


@triton.jit
def _scores(x_ptr, row, column, width, stride, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr):
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    rows_ptr = x_ptr + row.to(tl.int64)[:, None] * stride
    columns_ptr = x_ptr + column.to(tl.int64)[:, None] * stride
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(rows_ptr + d, mask=(row < N)[:, None] & (d < width), other=0.0)  # [ROWS, BLOCK_D]
        y = tl.load(columns_ptr + d, mask=(column < N)[:, None] & (d < width), other=0.0)  # [COLUMNS, BLOCK_D]
        products = tl.dot(x, tl.trans(y), products, input_precision="tf32x3")
        y = y.to(tl.float32)
        squares += tl.sum(y * y, 1)
    return squares[None, :] - 2 * products


@triton.jit
def measure(xs, widths, strides, extremes_ptr, chosen_ptr, same_ptr, terms_ptr, distances_ptr, indices_ptr, pulls_ptr,
            valid_ptr, N, margin, SOFT: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_D: tl.constexpr):  # fmt: skip
    """Grid (N, heads), one anchor each -> its share of the mean loss in terms (heads, N); distances, indices and pulls
    (2, heads, N), a pull being the share's derivative by a distance, over the distance; valid (N,)."""
    anchor, head = tl.program_id(0), tl.program_id(1)
    heads = len(xs)
    part = tl.arange(0, BLOCK_S)
    count = tl.sum(tl.load(same_ptr + anchor.to(tl.int64) * S + part, mask=part < S, other=0), 0)
    valid = (count > 1) & (count < N)
    anchors = _valid_anchors(same_ptr, N, S, BLOCK_S, BLOCK_N)
    at = (head * N + anchor).to(tl.int64)
    after = heads * N
    scores = tl.load(extremes_ptr + at * S + part, mask=part < S, other=float("-inf"))
    chosen = tl.load(chosen_ptr + at * S + part, mask=part < S, other=N)
    positive = tl.min(tl.where(scores == tl.max(scores, 0), chosen, N), 0)
    at_other = after.to(tl.int64) + at
    scores = tl.load(extremes_ptr + at_other * S + part, mask=part < S, other=float("inf"))
    chosen = tl.load(chosen_ptr + at_other * S + part, mask=part < S, other=N)
    negative = tl.min(tl.where(scores == tl.min(scores, 0), chosen, N), 0)
    for i in tl.static_range(len(xs)):
        if head == i:
            to_positive, to_negative = _squares(xs[i], widths[i], strides[i], anchor, positive, negative, BLOCK_D)
            _finish(to_positive, to_negative, valid, anchors, margin, terms_ptr + at, distances_ptr + at,
                    pulls_ptr + at, after, SOFT)  # fmt: skip
    tl.store(indices_ptr + at, positive.to(tl.int64))
    tl.store(indices_ptr + at_other, negative.to(tl.int64))
    tl.store(valid_ptr + anchor, valid, mask=head == 0)


@triton.jit
def _valid_anchors(same_ptr, N, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many anchors have another image of their person and one of another person."""
    anchors = tl.zeros((BLOCK_N,), tl.int32)
    part = tl.arange(0, BLOCK_S)[None, :]
    for start in tl.range(0, N, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        mask = (row < N)[:, None] & (part < S)
        count = tl.sum(tl.load(same_ptr + row.to(tl.int64)[:, None] * S + part, mask=mask, other=0), 1)
        anchors += ((count > 1) & (count < N)).to(tl.int32)
    return tl.sum(anchors, 0)


@triton.jit
def _squares(x_ptr, width, stride, anchor, positive, negative, BLOCK_D: tl.constexpr):
    """|x - y|^2 of the anchor and its two partners."""
    to_positive = tl.zeros((BLOCK_D,), tl.float32)
    to_negative = tl.zeros((BLOCK_D,), tl.float32)
    anchor_ptr = x_ptr + anchor.to(tl.int64) * stride
    positive_ptr = x_ptr + positive.to(tl.int64) * stride
    negative_ptr = x_ptr + negative.to(tl.int64) * stride
    for start in tl.range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(anchor_ptr + d, mask=d < width, other=0.0).to(tl.float32)
        p = x - tl.load(positive_ptr + d, mask=d < width, other=0.0).to(tl.float32)
        n = x - tl.load(negative_ptr + d, mask=d < width, other=0.0).to(tl.float32)
        to_positive += p * p
        to_negative += n * n
    return tl.sum(to_positive, 0), tl.sum(to_negative, 0)


@triton.jit
def _finish(to_positive, to_negative, valid, anchors, margin, term_ptr, distance_ptr, pull_ptr, after,
            SOFT: tl.constexpr):  # fmt: skip
    least = 1e-12  # of a square; below it nothing pulls
    positive = tl.sqrt_rn(tl.where(to_positive < least, least, to_positive))
    negative = tl.sqrt_rn(tl.where(to_negative < least, least, to_negative))
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
    share = 1.0 / tl.maximum(anchors, 1).to(tl.float32)
    tl.store(term_ptr, tl.where(valid, loss * share, 0.0))
    tl.store(distance_ptr, positive)
    tl.store(distance_ptr + after, negative)
    tl.store(pull_ptr, tl.where(valid & (to_positive >= least), slope * share / positive, 0.0))
    tl.store(pull_ptr + after, tl.where(valid & (to_negative >= least), slope * share / negative, 0.0))


@triton.jit
def differentiate(xs, gradients, widths, strides, indices_ptr, pulls_ptr, upstream_ptr, head_stride, anchor_stride, N,
                  BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Grid (N, blocks of all D): an image's gradient gathers its own pulls and those of all who chose it."""
    block = tl.program_id(1)
    for head in tl.static_range(len(xs)):
        blocks = tl.cdiv(widths[head], BLOCK_D)
        if (block >= 0) & (block < blocks):
            _differentiate(xs[head], gradients[head], block, widths[head], strides[head], indices_ptr + head * N,
                           pulls_ptr + head * N, upstream_ptr + head * head_stride, len(xs) * N, anchor_stride, N,
                           BLOCK_N, CHUNK, BLOCK_D)  # fmt: skip
        block -= blocks


@triton.jit
def _differentiate(x_ptr, gradient_ptr, block, width, stride, indices_ptr, pulls_ptr, upstream_ptr, after,
                   anchor_stride, N, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row.to(tl.int64) * stride + d, mask=d < width, other=0.0).to(tl.float32)
    upstream = tl.load(upstream_ptr + row * anchor_stride).to(tl.float32)
    positive = tl.load(x_ptr + tl.load(indices_ptr + row) * stride + d, mask=d < width, other=0.0).to(tl.float32)
    negative = tl.load(x_ptr + tl.load(indices_ptr + after + row) * stride + d, mask=d < width, other=0.0).to(
        tl.float32
    )
    gradient = tl.load(pulls_ptr + row) * (x - positive) - tl.load(pulls_ptr + after + row) * (x - negative)
    gradient *= upstream
    for first in tl.range(0, N, BLOCK_N):
        anchor = first + tl.arange(0, BLOCK_N)
        chose = tl.load(indices_ptr + anchor, mask=anchor < N, other=-1) == row
        chose |= tl.load(indices_ptr + after + anchor, mask=anchor < N, other=-1) == row
        if tl.max(chose.to(tl.int32), 0) > 0:
            for start in tl.range(first, tl.minimum(first + BLOCK_N, N), CHUNK):
                gradient += _pulls(x_ptr, x, row, start, d, width, stride, indices_ptr, pulls_ptr, upstream_ptr, after,
                                   anchor_stride, N, CHUNK, BLOCK_D)  # fmt: skip
    tl.store(gradient_ptr + row.to(tl.int64) * width + d, gradient, mask=d < width)


@triton.jit
def _pulls(x_ptr, x, row, start, d, width, stride, indices_ptr, pulls_ptr, upstream_ptr, after, anchor_stride, N,
           CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """What the anchors start..start+CHUNK add to the gradient of the image that some of them chose, [BLOCK_D]."""
    anchor = start + tl.arange(0, CHUNK)
    as_positive = tl.load(indices_ptr + anchor, mask=anchor < N, other=-1) == row
    as_negative = tl.load(indices_ptr + after + anchor, mask=anchor < N, other=-1) == row
    pull = tl.load(pulls_ptr + anchor, mask=as_positive, other=0.0)
    pull -= tl.load(pulls_ptr + after + anchor, mask=as_negative, other=0.0)
    chose = as_positive | as_negative
    pull *= tl.load(upstream_ptr + anchor * anchor_stride, mask=chose, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + anchor.to(tl.int64)[:, None] * stride + d[None, :],
                mask=chose[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)  # fmt: skip
    return tl.sum(tl.where(chose[:, None], pull[:, None] * (x[None, :] - y), 0.0), 0)
