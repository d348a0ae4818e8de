"""The backward kernel of `dual_self_attention`: a program holds the keys and values of one head of one image on chip.

    P = exp(S - lse),  delta = rowsum(dO O):   dV = P^T dO,  dS = P (dO V^T - delta),  dQ = dS K,  dK = dS^T Q

S is computed transposed, keys by queries: P and dS then enter the products for dV and dK from registers. The program
owns all keys of its head, so that dQ of a tile of queries is complete with the tile: no atomics, the same bits in every
run. Heads too long or too wide for that are streamed: some programs own keys, others queries.
N tokens, H heads, D head width, C = H * D. Exponents are base 2: `scale` is `natural_scale` times log2(e).
"""

import triton
import triton.language as tl

from fusionreid.kernels._head import load, load_token, store, store_token


@triton.jit
def backward(
    qkv_a, out_a, do_a, lse_a, dqkv_a, qkv_b, out_b, do_b, lse_b, dqkv_b, scale, natural_scale, programs_a,
    N_A: tl.constexpr, ROWS_A: tl.constexpr, FIRST_A: tl.constexpr, KEYS_A: tl.constexpr, TILES_A: tl.constexpr,
    RESIDENT_A: tl.constexpr,
    N_B: tl.constexpr, ROWS_B: tl.constexpr, FIRST_B: tl.constexpr, KEYS_B: tl.constexpr, TILES_B: tl.constexpr,
    RESIDENT_B: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, STREAMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if STREAMS == 1 or program < programs_a:
        _backward(qkv_a, out_a, do_a, lse_a, dqkv_a, program, scale, natural_scale,
                  N_A, ROWS_A, FIRST_A, KEYS_A, TILES_A, RESIDENT_A, H, D, BLOCK_D, STAGES)  # fmt: skip
    else:
        _backward(qkv_b, out_b, do_b, lse_b, dqkv_b, program - programs_a, scale, natural_scale,
                  N_B, ROWS_B, FIRST_B, KEYS_B, TILES_B, RESIDENT_B, H, D, BLOCK_D, STAGES)  # fmt: skip


@triton.jit
def _backward(
    qkv_ptr, out_ptr, do_ptr, lse_ptr, dqkv_ptr, program, scale, natural_scale,
    N: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
    RESIDENT: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """TILES programs share a head; RESIDENT: there is one, which owns all KEYS but, with FIRST 1, the class token's."""
    C: tl.constexpr = H * D
    KEY_TILES: tl.constexpr = (N + KEYS - 1) // KEYS
    pair, tile = program // TILES, (program % TILES).to(tl.int32)
    image, head = pair // H, pair % H
    qkv_ptr += image * (N * 3 * C) + head * D
    dqkv_ptr += image * (N * 3 * C) + head * D
    out_ptr += image * (N * C) + head * D
    do_ptr += image * (N * C) + head * D
    lse_ptr += pair * N
    if RESIDENT:
        _of_keys(qkv_ptr, out_ptr, do_ptr, lse_ptr, dqkv_ptr, FIRST, scale, natural_scale,
                 N, C, D, BLOCK_D, KEYS, ROWS, FIRST, True, STAGES)  # fmt: skip
    elif tile < KEY_TILES:
        _of_keys(qkv_ptr, out_ptr, do_ptr, lse_ptr, dqkv_ptr, tile * KEYS, scale, natural_scale,
                 N, C, D, BLOCK_D, KEYS, ROWS, 0, False, STAGES)  # fmt: skip
    else:
        _of_queries(qkv_ptr, out_ptr, do_ptr, lse_ptr, dqkv_ptr, (tile - KEY_TILES) * ROWS, scale, natural_scale,
                    N, C, D, BLOCK_D, KEYS, ROWS)  # fmt: skip


@triton.jit
def _of_keys(
    qkv_ptr, out_ptr, do_ptr, lse_ptr, dqkv_ptr, first_key, scale, natural_scale,
    N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    FIRST: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of KEYS keys; RESIDENT: these are all, and dQ is computed too."""
    WHOLE_KEYS: tl.constexpr = RESIDENT and FIRST + KEYS <= N
    WHOLE_ROWS: tl.constexpr = (N - FIRST) % ROWS == 0
    k = load(qkv_ptr + C, first_key, N, 3 * C, D, KEYS, BLOCK_D, WHOLE_KEYS)
    v = load(qkv_ptr + 2 * C, first_key, N, 3 * C, D, KEYS, BLOCK_D, WHOLE_KEYS)
    dk = tl.zeros((KEYS, BLOCK_D), tl.float32)
    dv = tl.zeros((KEYS, BLOCK_D), tl.float32)
    if FIRST == 1:
        class_key = load_token(qkv_ptr + C, D, BLOCK_D)
        class_value = load_token(qkv_ptr + 2 * C, D, BLOCK_D)
        dk, dv, class_dk, class_dv = _of_class_token(
            qkv_ptr, out_ptr, do_ptr, lse_ptr, dqkv_ptr, k, v, class_key, class_value, scale, natural_scale, D, BLOCK_D
        )
    for first in tl.range(FIRST, N, ROWS, num_stages=STAGES):
        q, do, lse, delta = _load_queries(qkv_ptr, out_ptr, do_ptr, lse_ptr, first, N, C, D, BLOCK_D, ROWS, WHOLE_ROWS)
        p, ds = _weights(q, do, lse, delta, k, v, first_key, scale, N, KEYS, WHOLE_KEYS)
        dv = tl.dot(p, do, dv, input_precision="ieee")
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        if RESIDENT:
            dq = tl.dot(tl.trans(k), ds, input_precision="ieee")  # [BLOCK_D, ROWS]
            if FIRST == 1:
                wide_q, wide_do = q.to(tl.float32), do.to(tl.float32)
                class_p = tl.exp2(tl.sum(wide_q * class_key, 1) * scale - lse)
                class_ds = class_p * (tl.sum(wide_do * class_value, 1) - delta)
                class_dk += tl.sum(class_ds[:, None] * wide_q, 0)
                class_dv += tl.sum(class_p[:, None] * wide_do, 0)
                dq += class_key[:, None] * class_ds
            store(dqkv_ptr, tl.trans(dq) * natural_scale, first, N, 3 * C, D, ROWS, BLOCK_D, WHOLE_ROWS)
    if FIRST == 1:
        store_token(dqkv_ptr + C, class_dk * natural_scale, D, BLOCK_D)
        store_token(dqkv_ptr + 2 * C, class_dv, D, BLOCK_D)
    store(dqkv_ptr + C, dk * natural_scale, first_key, N, 3 * C, D, KEYS, BLOCK_D, WHOLE_KEYS)
    store(dqkv_ptr + 2 * C, dv, first_key, N, 3 * C, D, KEYS, BLOCK_D, WHOLE_KEYS)


@triton.jit
def _of_class_token(
    qkv_ptr, out_ptr, do_ptr, lse_ptr, dqkv_ptr, k, v, class_key, class_value, scale, natural_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the class token's query adds to dK and dV, of the other keys and of its own; its dQ is stored."""
    q = load_token(qkv_ptr, D, BLOCK_D)
    do = load_token(do_ptr, D, BLOCK_D)
    lse = tl.load(lse_ptr)
    delta = tl.sum(load_token(out_ptr, D, BLOCK_D) * do, 0)
    wide_k = k.to(tl.float32)
    p = tl.exp2(tl.sum(wide_k * q, 1) * scale - lse)
    ds = p * (tl.sum(v.to(tl.float32) * do, 1) - delta)
    class_p = tl.exp2(tl.sum(class_key * q, 0) * scale - lse)
    class_ds = class_p * (tl.sum(class_value * do, 0) - delta)
    dq = tl.sum(ds[:, None] * wide_k, 0) + class_ds * class_key
    store_token(dqkv_ptr, dq * natural_scale, D, BLOCK_D)
    return ds[:, None] * q, p[:, None] * do, class_ds * q, class_p * do


@triton.jit
def _of_queries(
    qkv_ptr, out_ptr, do_ptr, lse_ptr, dqkv_ptr, first, scale, natural_scale,
    N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dQ of ROWS queries."""
    q, do, lse, delta = _load_queries(qkv_ptr, out_ptr, do_ptr, lse_ptr, first, N, C, D, BLOCK_D, ROWS, False)
    dq = tl.zeros((BLOCK_D, ROWS), tl.float32)
    for start in tl.range(0, N, KEYS, num_stages=1):
        k = load(qkv_ptr + C, start, N, 3 * C, D, KEYS, BLOCK_D, False)
        v = load(qkv_ptr + 2 * C, start, N, 3 * C, D, KEYS, BLOCK_D, False)
        _, ds = _weights(q, do, lse, delta, k, v, start, scale, N, KEYS, False)
        dq = tl.dot(tl.trans(k), ds, dq, input_precision="ieee")
    store(dqkv_ptr, tl.trans(dq) * natural_scale, first, N, 3 * C, D, ROWS, BLOCK_D, False)


@triton.jit
def _load_queries(
    qkv_ptr, out_ptr, do_ptr, lse_ptr, first, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """q and dO [ROWS, BLOCK_D], lse and delta [ROWS]."""
    q = load(qkv_ptr, first, N, 3 * C, D, ROWS, BLOCK_D, WHOLE)
    do = load(do_ptr, first, N, C, D, ROWS, BLOCK_D, WHOLE)
    out = load(out_ptr, first, N, C, D, ROWS, BLOCK_D, WHOLE)
    token = first + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + token, mask=token < N, other=float("inf"))  # past the last query every weight is 0
    return q, do, lse, tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)


@triton.jit
def _weights(q, do, lse, delta, k, v, first, scale, N: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr):
    """P^T and dS^T, [KEYS, queries], in the inputs' type; 0 past key N."""
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
    if not WHOLE:
        p = tl.where((first + tl.arange(0, KEYS) < N)[:, None], p, 0.0)
    ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
    return p.to(q.dtype), ds.to(q.dtype)
