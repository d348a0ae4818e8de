"""Self-attention of one or two token streams:  y = softmax(q k^T * scale) v, per image and head.

Source: Vaswani et al., Attention Is All You Need, arXiv:1706.03762; two streams as in FusionReID, arXiv:2412.17239.
B images, N tokens (each stream has its own N), H heads, D head width, C = H D; q, k, v packed as the projection leaves
them.

A program holds the keys and values of one head of one image on chip. All scores of a tile of queries are there at once,
so the softmax takes one pass and nothing is rescaled. The backward pass computes

    P = exp(S - lse),  delta = rowsum(dO O):   dV = P^T dO,  dS = P (dO V^T - delta),  dQ = dS K,  dK = dS^T Q

and has no atomics: one program computes all of a head's gradients, in the same order every time. Where the tokens
are one more than whole tiles (129 = 1 + 128), the class token, token 0, is taken apart as a row and a column
of multiply-adds. Exponents are base 2.
"""

import math
from functools import cache
from typing import Any, overload

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fusionreid.kernels._path import capability, on_device_of, use_triton

torch.compiler.assume_constant_result(capability)  # not where it is defined: this loads the compiler

FP32 = torch.finfo(torch.float32)
LOG2_E = tl.constexpr(math.log2(math.e))
MOST_TOKENS, WIDEST_HEAD = 256, 64  # whose keys and values a program holds
Blocks = tuple[tuple[int, int], ...]  # keys as (first, size); a first key of 1 leaves the class token apart
HAS_TILES = torch.cpu._is_amx_tile_supported()  # a CPU without AMX is slower in torch's half-precision attention


@overload
def dual_self_attention(qkv_a: Tensor, qkv_b: None = None, scale: float | None = None) -> Tensor: ...
@overload
def dual_self_attention(qkv_a: Tensor, qkv_b: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]: ...
def dual_self_attention(
    qkv_a: Tensor, qkv_b: Tensor | None = None, scale: float | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every token over the tokens of its stream: each qkv (B, N, 3, H, D) -> (B, N, H * D), or a pair.

    `scale` is above 0, by default 1 / sqrt(D). Computed in the dtype of qkv, softmax and sums in float32. The kernels
    take contiguous bf16 and fp16 of up to 256 tokens and heads up to 64 wide on GPUs of compute capability 9.0 and
    10.x; longer or wider inputs, float32 and other GPUs go to torch's `scaled_dot_product_attention`. Raises ValueError
    where a shape, dtype, layout or the scale is wrong.
    """
    _check("qkv_a", qkv_a)
    if scale is None:
        scale = qkv_a.shape[-1] ** -0.5
    elif not FP32.tiny <= scale <= FP32.max / 2:
        raise ValueError(f"dual_self_attention: scale must be above 0 and finite in float32, got {scale}")
    if qkv_b is None:
        return _attend("qkv_a", qkv_a, scale)
    _check("qkv_b", qkv_b)
    a, b = ((qkv.shape[0], qkv.shape[2:], qkv.dtype, qkv.device) for qkv in (qkv_a, qkv_b))
    if a != b:
        raise ValueError(
            "dual_self_attention: both streams must have the same images, heads, head width, dtype and device, got "
            f"{tuple(qkv_a.shape)} {qkv_a.dtype} {qkv_a.device} and {tuple(qkv_b.shape)} {qkv_b.dtype} {qkv_b.device}"
        )
    return _attend("qkv_a", qkv_a, scale), _attend("qkv_b", qkv_b, scale)


def _check(name: str, qkv: Tensor) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.numel() == 0 or not qkv.is_floating_point():
        raise ValueError(
            f"dual_self_attention: {name} must be floating (B, N, 3, H, D), none of them 0, "
            f"got {tuple(qkv.shape)} {qkv.dtype}"
        )


def _attend(name: str, qkv: Tensor, scale: float) -> Tensor:
    if use_triton(qkv) and takes(qkv):
        if not qkv.is_contiguous():
            raise ValueError(f"dual_self_attention: {name} must be contiguous, its strides are {qkv.stride()}")
        return _forward(qkv, scale)[0]
    dtype = qkv.dtype if qkv.is_cuda or HAS_TILES else torch.promote_types(qkv.dtype, torch.float32)
    query, key, value = qkv.to(dtype).permute(2, 0, 3, 1, 4)  # views (B, H, N, D)
    with torch.autocast("cuda" if qkv.is_cuda else "cpu", enabled=False):
        y = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return y.transpose(1, 2).flatten(2).to(qkv.dtype)


def takes(qkv: Tensor) -> bool:
    """Whether the kernels take it: a program holds a head, and operands of products stay in shared memory."""
    small = qkv.element_size() == 2 and qkv.shape[1] <= MOST_TOKENS and qkv.shape[4] <= WIDEST_HEAD
    return small and capability(qkv.device) // 10 in (9, 10)


@torch.library.custom_op("fusionreid::dual_self_attention", mutates_args=())
def _forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output (B, N, H * D) and the log2 of each query's sum of exponentials (B, H, N)."""
    out, lse = _empty_results(qkv, scale)
    images, tokens, _, heads, width = qkv.shape
    with on_device_of(qkv):
        forward_kernel[(images * heads,)](
            qkv, out, lse, scale, tokens, _forward_blocks(tokens), 64, heads, width, _padded(width), num_warps=4
        )
    return out, lse


@_forward.register_fake
def _empty_results(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    images, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(images, tokens, heads * width)
    return out, qkv.new_empty(images, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("fusionreid::dual_self_attention_backward", mutates_args=())
def _backward(qkv: Tensor, out: Tensor, grad: Tensor, lse: Tensor, scale: float) -> Tensor:
    """The gradient of qkv, given that of the output, contiguous as all of them."""
    dqkv = torch.empty_like(qkv)
    images, tokens, _, heads, width = qkv.shape
    blocks = _backward_blocks(tokens)
    if len(blocks) == 1:
        starts, rows, stages, warps = lse, 64, 3, 8
    else:
        starts, rows, stages, warps = lse.new_empty(images, heads, 2, triton.cdiv(tokens, 32) * 32), 32, 2, 4
    with on_device_of(qkv):
        backward_kernel[(images * heads,)](
            qkv, out, grad, lse, starts, dqkv, scale,
            tokens, blocks, rows, heads, width, _padded(width), stages, num_warps=warps,
        )  # fmt: skip
    return dqkv


@_backward.register_fake
def _(qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    qkv, out, lse = ctx.saved_tensors
    return None if grad is None else _backward(qkv, out, grad.contiguous(), lse, ctx.scale), None


_forward.register_autograd(_differentiate, setup_context=_save)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


@cache
def _forward_blocks(tokens: int) -> Blocks:
    """At most three, of powers of two from 16 to 128: 129 is 1 + 128, 211 in 128 + 64 + 32."""
    first = int(tokens in (65, 129))
    sixteens = triton.cdiv(tokens - first, 16)
    while sixteens.bit_count() > 3:
        sixteens += sixteens & -sixteens
    left, blocks = 16 * sixteens, []
    while left:
        size = min(128, 1 << left.bit_length() - 1)
        blocks.append((first, size))
        first, left = first + size, left - size
    return tuple(blocks)


def _backward_blocks(tokens: int) -> Blocks:
    """At most two, whose dK and dV fit the registers one after the other: 129 is 1 + 128, 211 in 128 + 128."""
    if tokens in (65, 129):
        return ((1, tokens - 1),)
    if tokens <= 128:
        return ((0, max(16, triton.next_power_of_2(tokens))),)
    return (0, 128), (128, max(64, triton.next_power_of_2(tokens - 128)))


@triton.jit
def forward_kernel(
    qkv_ptr, out_ptr, lse_ptr, scale, N: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (B H,): all queries of a head, ROWS at a time, over its keys in BLOCKS of (first, size)."""
    C: tl.constexpr = H * D
    FIRST: tl.constexpr = BLOCKS[0][0]  # 1: the class token is taken apart
    WHOLE: tl.constexpr = (N - FIRST) % ROWS == 0
    pair = tl.program_id(0).to(tl.int64)
    image, head = pair // H, pair % H
    qkv_ptr += image * (N * 3 * C) + head * D
    out_ptr += image * (N * C) + head * D
    lse_ptr += pair * N
    log2_scale = scale * LOG2_E
    keys = _load_blocks(qkv_ptr + C, N, 3 * C, D, BLOCK_D, BLOCKS)
    values = _load_blocks(qkv_ptr + 2 * C, N, 3 * C, D, BLOCK_D, BLOCKS)
    if FIRST == 1:
        class_key = _load_token(qkv_ptr + C, D, BLOCK_D)
        class_value = _load_token(qkv_ptr + 2 * C, D, BLOCK_D)
        _attend_from_class_token(
            qkv_ptr, out_ptr, lse_ptr, keys, values, class_key, class_value, log2_scale, D, BLOCK_D
        )
    for first in tl.range(FIRST, N, ROWS, num_stages=1):
        q = _load(qkv_ptr, first, N, 3 * C, D, ROWS, BLOCK_D, WHOLE)
        highest = tl.full((ROWS,), float("-inf"), tl.float32)
        if FIRST == 1:
            class_score = tl.sum(q.to(tl.float32) * class_key, 1)
            highest = class_score
        scores: tl.tuple = ()
        for i in tl.static_range(len(BLOCKS)):
            s = tl.dot(q, tl.trans(keys[i]))  # [ROWS, size]
            if BLOCKS[i][0] + BLOCKS[i][1] > N:
                s = tl.where(BLOCKS[i][0] + tl.arange(0, BLOCKS[i][1]) < N, s, float("-inf"))
            scores += (s,)
            highest = tl.maximum(highest, tl.max(s, 1))
        highest *= log2_scale
        out = tl.zeros((ROWS, BLOCK_D), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for i in tl.static_range(len(BLOCKS)):
            p = tl.exp2(scores[i] * log2_scale - highest[:, None])
            total += tl.sum(p, 1)
            out = tl.dot(p.to(q.dtype), values[i], out)
        if FIRST == 1:
            class_weight = tl.exp2(class_score * log2_scale - highest)
            total += class_weight
            out += class_weight[:, None] * class_value
        _store(out_ptr, out / total[:, None], first, N, C, D, ROWS, BLOCK_D, WHOLE)
        token = first + tl.arange(0, ROWS)
        tl.store(lse_ptr + token, highest + tl.log2(total), mask=token < N)


@triton.jit
def _attend_from_class_token(
    qkv_ptr, out_ptr, lse_ptr, keys, values, class_key, class_value, log2_scale, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    q = _load_token(qkv_ptr, D, BLOCK_D) * log2_scale
    class_score = tl.sum(q * class_key, 0)
    highest = class_score
    scores: tl.tuple = ()
    for i in tl.static_range(len(keys)):
        scores += (tl.sum(keys[i].to(tl.float32) * q, 1),)
        highest = tl.maximum(highest, tl.max(scores[i], 0))
    total = tl.exp2(class_score - highest)
    out = total * class_value
    for i in tl.static_range(len(keys)):
        p = tl.exp2(scores[i] - highest)
        total += tl.sum(p, 0)
        out += tl.sum(p[:, None] * values[i].to(tl.float32), 0)
    _store_token(out_ptr, out / total, D, BLOCK_D)
    tl.store(lse_ptr, highest + tl.log2(total))


@triton.jit
def backward_kernel(
    qkv_ptr, out_ptr, do_ptr, lse_ptr, starts_ptr, dqkv_ptr, scale, N: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (B H,): dK and dV of a block of keys stay in registers while all queries pass, ROWS at a time.

    S is computed transposed, keys by queries: P and dS then enter the products for dV and dK from registers. The
    products for S and dO V^T start at -lse and -delta, in their units. With two blocks a sweep over the queries makes
    these numbers first, (B H, 2, N up to a whole tile), and dQ of the first block waits in its place for that of the
    second.
    """
    C: tl.constexpr = H * D
    FIRST: tl.constexpr = BLOCKS[0][0]
    WHOLE: tl.constexpr = (N - FIRST) % ROWS == 0
    pair = tl.program_id(0).to(tl.int64)
    image, head = pair // H, pair % H
    qkv_ptr += image * (N * 3 * C) + head * D
    dqkv_ptr += image * (N * 3 * C) + head * D
    out_ptr += image * (N * C) + head * D
    do_ptr += image * (N * C) + head * D
    lse_ptr += pair * N
    PADDED: tl.constexpr = tl.cdiv(N, ROWS) * ROWS
    starts_ptr += pair * 2 * PADDED
    delta_ptr = starts_ptr + PADDED
    log2_scale = scale * LOG2_E
    if len(BLOCKS) > 1:
        for first in tl.range(0, N, ROWS, num_stages=4):
            do = _load(do_ptr, first, N, C, D, ROWS, BLOCK_D, WHOLE)
            s_start, dp_start = _starts(out_ptr, do, lse_ptr, log2_scale, first, N, C, D, ROWS, BLOCK_D, WHOLE)
            token = first + tl.arange(0, ROWS)
            tl.store(starts_ptr + token, s_start)
            tl.store(delta_ptr + token, dp_start)
    for i in tl.static_range(len(BLOCKS)):
        k = _load_block(qkv_ptr + C, i, N, 3 * C, D, BLOCK_D, BLOCKS)
        v = _load_block(qkv_ptr + 2 * C, i, N, 3 * C, D, BLOCK_D, BLOCKS)
        if FIRST == 1:
            class_key = _load_token(qkv_ptr + C, D, BLOCK_D)
            class_value = _load_token(qkv_ptr + 2 * C, D, BLOCK_D)
            dk, dv, class_dk, class_dv = _differentiate_class_token(
                qkv_ptr, out_ptr, do_ptr, lse_ptr, dqkv_ptr, k, v, class_key, class_value, scale, D, BLOCK_D
            )
        else:
            dk = tl.zeros(k.shape, tl.float32)
            dv = tl.zeros(k.shape, tl.float32)
        if len(BLOCKS) > 1:
            tl.debug_barrier()  # other threads wrote the starts and the first block's dQ
        for first in tl.range(FIRST, N, ROWS, num_stages=STAGES):
            q = _load(qkv_ptr, first, N, 3 * C, D, ROWS, BLOCK_D, WHOLE)
            do = _load(do_ptr, first, N, C, D, ROWS, BLOCK_D, WHOLE)
            if len(BLOCKS) > 1:
                token = first + tl.arange(0, ROWS)
                s_start = tl.load(starts_ptr + token)
                dp_start = tl.load(delta_ptr + token)
            else:
                s_start, dp_start = _starts(out_ptr, do, lse_ptr, log2_scale, first, N, C, D, ROWS, BLOCK_D, WHOLE)
            s = tl.dot(k, tl.trans(q), tl.broadcast_to(s_start[None, :], [BLOCKS[i][1], ROWS]))
            dp = tl.dot(v, tl.trans(do), tl.broadcast_to(dp_start[None, :], [BLOCKS[i][1], ROWS]))
            p = tl.exp2(s * log2_scale)
            if BLOCKS[i][0] + BLOCKS[i][1] > N:
                p = tl.where((BLOCKS[i][0] + tl.arange(0, BLOCKS[i][1]) < N)[:, None], p, 0.0)
            ds = (p * dp).to(q.dtype)
            dv = tl.dot(p.to(q.dtype), do, dv)
            dk = tl.dot(ds, q, dk)
            dq = tl.dot(tl.trans(k), ds)  # [BLOCK_D, ROWS]
            if FIRST == 1:
                wide_q, wide_do = q.to(tl.float32), do.to(tl.float32)
                class_p = tl.exp2((tl.sum(wide_q * class_key, 1) + s_start) * log2_scale)
                class_ds = class_p * (tl.sum(wide_do * class_value, 1) + dp_start)
                class_dk += tl.sum(class_ds[:, None] * wide_q, 0)
                class_dv += tl.sum(class_p[:, None] * wide_do, 0)
                dq += class_key[:, None] * class_ds
            dq = tl.trans(dq) * scale
            if i > 0:
                dq += _load(dqkv_ptr, first, N, 3 * C, D, ROWS, BLOCK_D, WHOLE).to(tl.float32)
            _store(dqkv_ptr, dq, first, N, 3 * C, D, ROWS, BLOCK_D, WHOLE)
        if FIRST == 1:
            _store_token(dqkv_ptr + C, class_dk * scale, D, BLOCK_D)
            _store_token(dqkv_ptr + 2 * C, class_dv, D, BLOCK_D)
        _store_block(dqkv_ptr + C, dk * scale, i, N, 3 * C, D, BLOCK_D, BLOCKS)
        _store_block(dqkv_ptr + 2 * C, dv, i, N, 3 * C, D, BLOCK_D, BLOCKS)


@triton.jit
def _starts(
    out_ptr, do, lse_ptr, log2_scale, first, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """-lse in the units of S and -delta, [ROWS]; past the last query -inf, so that every weight is 0."""
    out = _load(out_ptr, first, N, C, D, ROWS, BLOCK_D, WHOLE)
    token = first + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + token, mask=token < N, other=float("inf"))
    return -lse / log2_scale, -tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)


@triton.jit
def _differentiate_class_token(
    qkv_ptr, out_ptr, do_ptr, lse_ptr, dqkv_ptr, k, v, class_key, class_value, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The class token's query: its dQ is stored, its shares of dK and dV of the other keys and its own are returned."""
    q = _load_token(qkv_ptr, D, BLOCK_D)
    do = _load_token(do_ptr, D, BLOCK_D)
    lse = tl.load(lse_ptr)
    delta = tl.sum(_load_token(out_ptr, D, BLOCK_D) * do, 0)
    wide_k = k.to(tl.float32)
    p = tl.exp2(tl.sum(wide_k * q, 1) * (scale * LOG2_E) - lse)
    ds = p * (tl.sum(v.to(tl.float32) * do, 1) - delta)
    class_p = tl.exp2(tl.sum(class_key * q, 0) * (scale * LOG2_E) - lse)
    class_ds = class_p * (tl.sum(class_value * do, 0) - delta)
    dq = tl.sum(ds[:, None] * wide_k, 0) + class_ds * class_key
    _store_token(dqkv_ptr, dq * scale, D, BLOCK_D)
    return ds[:, None] * q, p[:, None] * do, class_ds * q, class_p * do


@triton.jit
def _load(
    ptr, first, N: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tokens first..first + SIZE, STRIDE apart, [SIZE, BLOCK_D]; zeros past column D.

    Where they are not WHOLE, the last token takes the place of those past it: a mask would take more instructions.
    """
    token, column = first + tl.arange(0, SIZE), tl.arange(0, BLOCK_D)
    if not WHOLE:
        token = tl.minimum(token, N - 1)
    at = ptr + token[:, None] * STRIDE + column
    if D == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=column < D, other=0.0)


@triton.jit
def _load_blocks(
    ptr, N: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr
):
    blocks: tl.tuple = ()
    for i in tl.static_range(len(BLOCKS)):
        blocks += (_load_block(ptr, i, N, STRIDE, D, BLOCK_D, BLOCKS),)
    return blocks


@triton.jit
def _load_block(
    ptr, i: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    return _load(ptr, BLOCKS[i][0], N, STRIDE, D, BLOCKS[i][1], BLOCK_D, BLOCKS[i][0] + BLOCKS[i][1] <= N)


@triton.jit
def _store(
    ptr, x, first, N: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    token, column = first + tl.arange(0, SIZE), tl.arange(0, BLOCK_D)
    at = ptr + token[:, None] * STRIDE + column
    if WHOLE and D == BLOCK_D:
        tl.store(at, x.to(ptr.dtype.element_ty))
    else:
        tl.store(at, x.to(ptr.dtype.element_ty), mask=(token[:, None] < N) & (column < D))


@triton.jit
def _store_block(
    ptr, x, i: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    _store(ptr, x, BLOCKS[i][0], N, STRIDE, D, BLOCKS[i][1], BLOCK_D, BLOCKS[i][0] + BLOCKS[i][1] <= N)


@triton.jit
def _load_token(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token in float32, [BLOCK_D]."""
    column = tl.arange(0, BLOCK_D)
    return tl.load(ptr + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def _store_token(ptr, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    tl.store(ptr + column, x.to(ptr.dtype.element_ty), mask=column < D)
