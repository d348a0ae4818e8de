"""Class attention in Triton, forward: one program per image and stream, which reads the tokens once.

A tile of tokens is cut into chunks of columns (WARPS, TOKENS, WIDTH). Each warp multiplies its own columns, so the
products share no operands; only sums over columns, (TOKENS, HEADS), cross warps. HEADS is H + 2 padded to a block.
key[h] = scale log2(e) norm_weight absorbed[h], and a row of ones at H whose product is a token's sum: scores are in
units of log 2. `trace` (B, N + 3, HEADS) keeps for the backward pass, per token, the scores, at H the mean and at H + 1
the reciprocal deviation; then rows with the highest scores, the softmax's reciprocal sums and the sums of the keys.
With KEEP the factors of all products stay on chip, without it they are read again where they are needed.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def columns_of(chunk, WARPS: tl.constexpr, WIDTH: tl.constexpr):
    within = tl.arange(0, WARPS)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return chunk * WARPS * WIDTH + within  # [WARPS, 1, WIDTH]


@triton.jit
def load_tile(ptr, rows, mask, stride, chunk, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr):
    columns = columns_of(chunk, WARPS, WIDTH)
    mask = mask[None, :, None]
    if C % (WARPS * WIDTH) != 0:
        mask = mask & (columns < C)
    return tl.load(ptr + rows[None, :, None] * stride + columns, mask=mask, other=0.0)  # [WARPS, len(rows), WIDTH]


@triton.jit
def store_tile(ptr, value, rows, mask, stride, chunk, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr):
    columns = columns_of(chunk, WARPS, WIDTH)
    mask = mask[None, :, None]
    if C % (WARPS * WIDTH) != 0:
        mask = mask & (columns < C)
    tl.store(ptr + rows[None, :, None] * stride + columns, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(ptr, multiplier, chunk, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr):
    columns = columns_of(chunk, WARPS, WIDTH)
    return tl.load(ptr + columns, mask=columns < C, other=0.0).to(tl.float32) * multiplier


@triton.jit
def load_key(
    absorbed, weight, multiplier, centre, head_stride, dtype: tl.constexpr, chunk,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS)
    key = load_tile(absorbed, head, head < H, head_stride, chunk, C, WARPS, WIDTH).to(tl.float32)
    key = key * load_weight(weight, multiplier, chunk, C, WARPS, WIDTH)
    key = tl.where(head[None, :, None] == H, 1.0, key)
    return (key - centre[None, :, None]).to(dtype)  # [WARPS, HEADS, WIDTH]


@triton.jit
def squared_distance(values, anchor, chunk, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr):
    distance = values.to(tl.float32) - anchor[None, :, None]
    if C % (WARPS * WIDTH) != 0:
        distance = tl.where(columns_of(chunk, WARPS, WIDTH) < C, distance, 0.0)
    return distance * distance  # [WARPS, TOKENS, WIDTH]


@triton.jit
def forward(
    a, b, multiplier, image_stride, head_stride,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr, TRACE: tl.constexpr,
):  # fmt: skip
    """pooled[h] = softmax_n(score[h, n]) tokens[n]: online softmax, sums in float32."""
    if tl.program_id(1) == 0:
        tokens, count, token_image_stride, token_stride, absorbed, weight, eps, pooled, trace = a
    else:
        tokens, count, token_image_stride, token_stride, absorbed, weight, eps, pooled, trace = b
    image = tl.program_id(0).to(tl.int64)
    tokens += image * token_image_stride
    absorbed += image * image_stride
    pooled += image * H * C
    trace += image * (count + 3) * HEADS
    dtype: tl.constexpr = tokens.dtype.element_ty
    head = tl.arange(0, HEADS)
    CHUNKS: tl.constexpr = (C + WARPS * WIDTH - 1) // (WARPS * WIDTH)

    keys: tl.tuple = ()
    context: tl.tuple = ()
    origin = tl.zeros([HEADS], tl.float32)
    key_sums = tl.zeros([WARPS, HEADS, WIDTH], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        key = load_key(absorbed, weight, multiplier, origin, head_stride, dtype, chunk, H, HEADS, C, WARPS, WIDTH)
        key_sums += key.to(tl.float32)
        if KEEP:
            keys += (key,)
        context += (tl.zeros([WARPS, HEADS, WIDTH], tl.float32),)
    key_sums = tl.sum(tl.sum(key_sums, 2), 0)  # [HEADS]
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)

    for first in tl.range(0, count, TOKENS, num_stages=STAGES):
        token = first + tl.arange(0, TOKENS)
        valid = token < count
        # the variance around a value of the token itself: a large mean does not cancel the digits away
        anchor = tl.load(tokens + token * token_stride, mask=valid, other=0.0).to(tl.float32)
        products = tl.zeros([WARPS, TOKENS, HEADS], tl.float32)
        squares = tl.zeros([WARPS, TOKENS, WIDTH], tl.float32)
        tile: tl.tuple = ()
        if KEEP:
            for chunk in tl.static_range(CHUNKS):
                values = load_tile(tokens, token, valid, token_stride, chunk, C, WARPS, WIDTH)
                products = tl.dot(values, tl.permute(keys[chunk], (0, 2, 1)), products)
                squares += squared_distance(values, anchor, chunk, C, WARPS, WIDTH)
                tile += (values,)
        else:
            for block in tl.range(CHUNKS, num_stages=1):
                values = load_tile(tokens, token, valid, token_stride, block, C, WARPS, WIDTH)
                key = load_key(
                    absorbed, weight, multiplier, origin, head_stride, dtype, block, H, HEADS, C, WARPS, WIDTH
                )
                products = tl.dot(values, tl.permute(key, (0, 2, 1)), products, input_precision="tf32x3")
                squares += squared_distance(values, anchor, block, C, WARPS, WIDTH)
        products = tl.sum(products, 0)  # [TOKENS, HEADS]
        mean = tl.sum(tl.where(head[None, :] == H, products, 0.0), 1) / C
        variance = tl.sum(tl.sum(squares, 2), 0) / C - (mean - anchor) * (mean - anchor)
        rstd = tl.rsqrt(tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)
        scores = rstd[:, None] * (products - mean[:, None] * key_sums[None, :])
        if TRACE:
            row = tl.where(head[None, :] == H, mean[:, None], scores)
            row = tl.where(head[None, :] == H + 1, rstd[:, None], row)
            tl.store(trace + token[:, None] * HEADS + head[None, :], row, mask=valid[:, None])
        scores = tl.where(valid[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 0))
        decay = tl.exp2(highest - higher)
        share = tl.exp2(scores - higher[None, :])
        total = total * decay + tl.sum(share, 0)
        highest = higher
        share = tl.broadcast_to(tl.trans(share).to(dtype)[None], [WARPS, HEADS, TOKENS])
        summed: tl.tuple = ()
        for chunk in tl.static_range(CHUNKS):
            values = tile[chunk] if KEEP else load_tile(tokens, token, valid, token_stride, chunk, C, WARPS, WIDTH)
            kept = context[chunk] * decay[None, :, None]
            summed += (tl.dot(share, values, kept, input_precision="tf32x3"),)
        context = summed

    if TRACE:
        tl.store(trace + count * HEADS + head, highest)
        tl.store(trace + (count + 1) * HEADS + head, 1 / total)
        tl.store(trace + (count + 2) * HEADS + head, key_sums)
    for chunk in tl.static_range(CHUNKS):
        store_tile(pooled, context[chunk] * (1 / total)[None, :, None], head, head < H, C, chunk, C, WARPS, WIDTH)
