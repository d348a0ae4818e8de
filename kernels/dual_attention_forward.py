"""The forward kernel of `dual_self_attention`: a program holds the keys and values of one head of one image on chip.

All scores of a tile of queries are there at once, so the softmax takes one pass and nothing is rescaled. The class
token, token 0, is taken apart as a row and a column of multiply-adds where the others then fill whole tiles (129 = 1 +
128). Heads too long or too wide for that (the plan in `dual_attention` says which) are streamed, one program per tile.
N tokens, H heads, D head width, C = H * D. Exponents are base 2: `scale` is that of the scores times log2(e).
"""

import triton
import triton.language as tl

from fusionreid.kernels._head import load, load_token, store, store_token


@triton.jit
def forward(
    qkv_a, out_a, lse_a, qkv_b, out_b, lse_b, scale, programs_a,
    N_A: tl.constexpr, ROWS_A: tl.constexpr, BLOCKS_A: tl.constexpr, TILES_A: tl.constexpr, RESIDENT_A: tl.constexpr,
    N_B: tl.constexpr, ROWS_B: tl.constexpr, BLOCKS_B: tl.constexpr, TILES_B: tl.constexpr, RESIDENT_B: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SAVE: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if STREAMS == 1 or program < programs_a:
        _attend(qkv_a, out_a, lse_a, program, scale, N_A, ROWS_A, BLOCKS_A, TILES_A, RESIDENT_A, H, D, BLOCK_D, SAVE)
    else:
        program -= programs_a
        _attend(qkv_b, out_b, lse_b, program, scale, N_B, ROWS_B, BLOCKS_B, TILES_B, RESIDENT_B, H, D, BLOCK_D, SAVE)


@triton.jit
def _attend(
    qkv_ptr, out_ptr, lse_ptr, program, scale,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, RESIDENT: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """ROWS queries at a time, keys in BLOCKS of (first, size); TILES programs share a head unless it is RESIDENT."""
    C: tl.constexpr = H * D
    pair = program // TILES
    image, head = pair // H, pair % H
    qkv_ptr += image * (N * 3 * C) + head * D
    out_ptr += image * (N * C) + head * D
    lse_ptr += pair * N
    if RESIDENT:
        _attend_resident(qkv_ptr, out_ptr, lse_ptr, scale, N, C, D, BLOCK_D, BLOCKS, ROWS, SAVE)
    else:
        first = (program % TILES).to(tl.int32) * ROWS
        _attend_streaming(qkv_ptr, out_ptr, lse_ptr, first, scale, N, C, D, BLOCK_D, BLOCKS[0][1], ROWS, SAVE)


@triton.jit
def _attend_resident(
    qkv_ptr, out_ptr, lse_ptr, scale, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    FIRST: tl.constexpr = BLOCKS[0][0]  # 1: the class token is taken apart
    WHOLE: tl.constexpr = (N - FIRST) % ROWS == 0
    keys = _load_blocks(qkv_ptr + C, N, C, D, BLOCK_D, BLOCKS)
    values = _load_blocks(qkv_ptr + 2 * C, N, C, D, BLOCK_D, BLOCKS)
    if FIRST == 1:
        class_key = load_token(qkv_ptr + C, D, BLOCK_D)
        class_value = load_token(qkv_ptr + 2 * C, D, BLOCK_D)
        _attend_class_token(qkv_ptr, out_ptr, lse_ptr, keys, values, class_key, class_value, scale, D, BLOCK_D, SAVE)
    for first in tl.range(FIRST, N, ROWS, num_stages=1):
        q = load(qkv_ptr, first, N, 3 * C, D, ROWS, BLOCK_D, WHOLE)
        highest = tl.full((ROWS,), float("-inf"), tl.float32)
        if FIRST == 1:
            class_score = tl.sum(q.to(tl.float32) * class_key, 1)
            highest = class_score
        scores = ()
        for i in tl.static_range(len(BLOCKS)):
            scores += (_scores(q, keys[i], BLOCKS[i][0], N, BLOCKS[i][1], BLOCKS[i][0] + BLOCKS[i][1] <= N),)
            highest = tl.maximum(highest, tl.max(scores[i], 1))
        highest *= scale
        out = tl.zeros((ROWS, BLOCK_D), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for i in tl.static_range(len(BLOCKS)):
            p = tl.exp2(scores[i] * scale - highest[:, None])
            total += tl.sum(p, 1)
            out = tl.dot(p.to(q.dtype), values[i], out, input_precision="ieee")
        if FIRST == 1:
            class_weight = tl.exp2(class_score * scale - highest)
            total += class_weight
            out += class_weight[:, None] * class_value
        _finish(out_ptr, lse_ptr, out, total, highest, first, N, C, D, BLOCK_D, ROWS, WHOLE, SAVE)


@triton.jit
def _attend_class_token(
    qkv_ptr, out_ptr, lse_ptr, keys, values, class_key, class_value, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    q = load_token(qkv_ptr, D, BLOCK_D) * scale
    class_score = tl.sum(q * class_key, 0)
    highest = class_score
    scores = ()
    for i in tl.static_range(len(keys)):
        scores += (tl.sum(keys[i].to(tl.float32) * q, 1),)
        highest = tl.maximum(highest, tl.max(scores[i], 0))
    total = tl.exp2(class_score - highest)
    out = total * class_value
    for i in tl.static_range(len(keys)):
        p = tl.exp2(scores[i] - highest)
        total += tl.sum(p, 0)
        out += tl.sum(p[:, None] * values[i].to(tl.float32), 0)
    store_token(out_ptr, out / total, D, BLOCK_D)
    if SAVE:
        tl.store(lse_ptr, highest + tl.log2(total))


@triton.jit
def _attend_streaming(
    qkv_ptr, out_ptr, lse_ptr, first, scale, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """One tile of queries over KEYS keys at a time: once for the highest score, once more for the sums."""
    q = load(qkv_ptr, first, N, 3 * C, D, ROWS, BLOCK_D, False)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in tl.range(0, N, KEYS, num_stages=1):
        k = load(qkv_ptr + C, start, N, 3 * C, D, KEYS, BLOCK_D, False)
        highest = tl.maximum(highest, tl.max(_scores(q, k, start, N, KEYS, False), 1))
    highest *= scale
    out = tl.zeros((ROWS, BLOCK_D), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(0, N, KEYS, num_stages=1):
        k = load(qkv_ptr + C, start, N, 3 * C, D, KEYS, BLOCK_D, False)
        v = load(qkv_ptr + 2 * C, start, N, 3 * C, D, KEYS, BLOCK_D, False)
        p = tl.exp2(_scores(q, k, start, N, KEYS, False) * scale - highest[:, None])
        total += tl.sum(p, 1)
        out = tl.dot(p.to(q.dtype), v, out, input_precision="ieee")
    _finish(out_ptr, lse_ptr, out, total, highest, first, N, C, D, BLOCK_D, ROWS, False, SAVE)


@triton.jit
def _load_blocks(
    ptr, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    parts = ()
    for i in tl.static_range(len(BLOCKS)):
        parts += (load(ptr, BLOCKS[i][0], N, 3 * C, D, BLOCKS[i][1], BLOCK_D, BLOCKS[i][0] + BLOCKS[i][1] <= N),)
    return parts


@triton.jit
def _scores(q, k, first, N: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr):
    """Unscaled, [queries, KEYS]; -inf past key N."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if not WHOLE:
        s = tl.where(first + tl.arange(0, KEYS) < N, s, float("-inf"))
    return s


@triton.jit
def _finish(
    out_ptr, lse_ptr, out, total, highest, first, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    store(out_ptr, out / total[:, None], first, N, C, D, ROWS, BLOCK_D, WHOLE)
    if SAVE:
        token = first + tl.arange(0, ROWS)
        tl.store(lse_ptr + token, highest + tl.log2(total), mask=token < N)
