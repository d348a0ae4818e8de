"""The backward kernel of `batch_hard_triplet`, all heads in one launch, in gather form: no order of arrival matters."""

# Triton reads its own annotations.
import triton
import triton.language as tl


@triton.jit
def differentiate(xs, gradients, widths, strides, indices_ptr, pulls_ptr, upstream_ptr, upstream_stride, shares_ptr,
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
            _differentiate(xs[head], gradients[head], block, widths[head], strides[head], indices_ptr + head * N,
                           pulls_ptr + head * N, scale, len(xs) * N, order_ptr + head * 2 * N,
                           starts_ptr + head * (N + 1), N, SORTED, BLOCK_E, CHUNK, BLOCK_D)  # fmt: skip
        block -= blocks


@triton.jit
def _differentiate(x_ptr, gradient_ptr, block, width, stride, indices_ptr, pulls_ptr, scale, after, order_ptr,
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
