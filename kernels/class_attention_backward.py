"""Class attention in Triton, backward: as the forward pass, one program per image and stream, the tokens read once."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from fusionreid.kernels.class_attention_forward import columns_of, load_key, load_tile, load_weight, store_tile

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def token_gradient(share, slope, by_token, key, diagonal, values, shift):
    sums = tl.broadcast_to(shift[None, :, None], values.shape)
    sums = tl.dot(share, slope, sums, input_precision="tf32x3")
    sums = tl.dot(by_token, key, sums, input_precision="tf32x3")
    return tl.dot(diagonal, values, sums, input_precision="tf32x3")  # [WARPS, TOKENS, WIDTH]


@triton.jit
def backward(
    a, b, multiplier, image_stride, head_stride, slope_image_stride, slope_head_stride,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """With ds = share (slope . token - slope . pooled), per token, r its reciprocal deviation and m its mean:

    d_key[h] = sum_n ds r (token - m)
    d_token = sum_h (share slope[h] + ds r (key[h] - its mean)) - r^2 (token - m) sum_h (ds score) / C
    """
    if tl.program_id(1) == 0:
        tokens, count, token_image_stride, token_stride, absorbed, weight, pooled, trace, slope, d_tokens = a[:10]
        d_absorbed, d_weight = a[10:]
    else:
        tokens, count, token_image_stride, token_stride, absorbed, weight, pooled, trace, slope, d_tokens = b[:10]
        d_absorbed, d_weight = b[10:]
    image = tl.program_id(0).to(tl.int64)
    tokens += image * token_image_stride
    absorbed += image * image_stride
    pooled += image * H * C
    trace += image * (count + 3) * HEADS
    slope += image * slope_image_stride
    d_tokens += image * count * C
    d_absorbed += image * image_stride
    d_weight += image * C
    dtype: tl.constexpr = tokens.dtype.element_ty
    head = tl.arange(0, HEADS)
    CHUNKS: tl.constexpr = (C + WARPS * WIDTH - 1) // (WARPS * WIDTH)

    key_mean = tl.load(trace + (count + 2) * HEADS + head) / C
    keys: tl.tuple = ()
    slopes: tl.tuple = ()
    d_keys: tl.tuple = ()
    delta = tl.zeros([WARPS, HEADS, WIDTH], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        upstream = load_tile(slope, head, head < H, slope_head_stride, chunk, C, WARPS, WIDTH)
        delta += upstream.to(tl.float32) * load_tile(pooled, head, head < H, C, chunk, C, WARPS, WIDTH).to(tl.float32)
        if KEEP:
            key = load_key(absorbed, weight, multiplier, key_mean, head_stride, dtype, chunk, H, HEADS, C, WARPS, WIDTH)
            keys += (key,)
            slopes += (upstream,)
        d_keys += (tl.zeros([WARPS, HEADS, WIDTH], tl.float32),)
    delta = tl.sum(tl.sum(delta, 2), 0)  # [HEADS]
    highest = tl.load(trace + count * HEADS + head)
    inverse = tl.load(trace + (count + 1) * HEADS + head)

    for first in tl.range(0, count, TOKENS, num_stages=STAGES):
        token = first + tl.arange(0, TOKENS)
        valid = token < count
        scores = tl.load(trace + token[:, None] * HEADS + head[None, :], mask=valid[:, None], other=0.0)
        mean = tl.sum(tl.where(head[None, :] == H, scores, 0.0), 1)
        rstd = tl.sum(tl.where(head[None, :] == H + 1, scores, 0.0), 1)
        d_share = tl.zeros([WARPS, TOKENS, HEADS], tl.float32)
        tile: tl.tuple = ()
        if KEEP:
            for chunk in tl.static_range(CHUNKS):
                values = load_tile(tokens, token, valid, token_stride, chunk, C, WARPS, WIDTH)
                d_share = tl.dot(values, tl.permute(slopes[chunk], (0, 2, 1)), d_share)
                tile += (values,)
        else:
            for block in tl.range(CHUNKS, num_stages=1):
                values = load_tile(tokens, token, valid, token_stride, block, C, WARPS, WIDTH)
                upstream = load_tile(slope, head, head < H, slope_head_stride, block, C, WARPS, WIDTH)
                d_share = tl.dot(values, tl.permute(upstream, (0, 2, 1)), d_share, input_precision="tf32x3")
        d_share = tl.sum(d_share, 0)  # [TOKENS, HEADS]
        inside = valid[:, None] & (head < H)[None, :]
        share = tl.where(inside, tl.exp2(scores - highest[None, :]) * inverse[None, :], 0.0)
        # a share of 1 has no slope; what the difference shows there is rounding
        d_scores = tl.where(share == 1, 0.0, share * (d_share - delta[None, :]) * LN_2)
        d_scores = (d_scores * rstd[:, None]).to(dtype)
        shrink = (tl.sum(d_scores.to(tl.float32) * scores, 1) * rstd / C).to(dtype)
        shift = mean * shrink.to(tl.float32)
        diagonal = tl.arange(0, TOKENS)[:, None] == tl.arange(0, TOKENS)[None, :]
        diagonal = tl.where(diagonal, -shrink.to(tl.float32)[:, None], 0.0).to(dtype)
        diagonal = tl.broadcast_to(diagonal[None], [WARPS, TOKENS, TOKENS])
        share = tl.broadcast_to(share.to(dtype)[None], [WARPS, TOKENS, HEADS])
        by_head = tl.broadcast_to(tl.trans(d_scores)[None], [WARPS, HEADS, TOKENS])
        by_token = tl.broadcast_to(d_scores[None], [WARPS, TOKENS, HEADS])
        if not KEEP:
            for block in tl.range(CHUNKS, num_stages=1):
                values = load_tile(tokens, token, valid, token_stride, block, C, WARPS, WIDTH)
                upstream = load_tile(slope, head, head < H, slope_head_stride, block, C, WARPS, WIDTH)
                key = load_key(
                    absorbed, weight, multiplier, key_mean, head_stride, dtype, block, H, HEADS, C, WARPS, WIDTH
                )
                d_values = token_gradient(share, upstream, by_token, key, diagonal, values, shift)
                store_tile(d_tokens, d_values, token, valid, C, block, C, WARPS, WIDTH)
        summed: tl.tuple = ()
        for chunk in tl.static_range(CHUNKS):
            values = tile[chunk] if KEEP else load_tile(tokens, token, valid, token_stride, chunk, C, WARPS, WIDTH)
            if KEEP:
                d_values = token_gradient(share, slopes[chunk], by_token, keys[chunk], diagonal, values, shift)
                store_tile(d_tokens, d_values, token, valid, C, chunk, C, WARPS, WIDTH)
            summed += (tl.dot(by_head, values, d_keys[chunk], input_precision="tf32x3"),)
        d_keys = summed

    centre = tl.zeros([WARPS, HEADS, WIDTH], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        centre += d_keys[chunk]
    centre = tl.sum(tl.sum(centre, 2), 0) / C  # [HEADS]: sum_n ds r m, since columns past C are zero
    for chunk in tl.static_range(CHUNKS):
        columns = columns_of(chunk, WARPS, WIDTH)
        d_key = d_keys[chunk] - centre[None, :, None]
        scaled = d_key * load_weight(weight, multiplier, chunk, C, WARPS, WIDTH)
        store_tile(d_absorbed, scaled, head, head < H, head_stride, chunk, C, WARPS, WIDTH)
        query = load_tile(absorbed, head, head < H, head_stride, chunk, C, WARPS, WIDTH).to(tl.float32)
        of_weight = tl.sum(query * d_key, 1)[:, None, :] * multiplier
        tl.store(d_weight + columns, of_weight, mask=columns < C)
