"""Class attention of one or two streams: a class token attends over tokens whose keys and values are never projected.

    score[h, n] = scale q[h] . W_k[h] LN(y[n]),   p = softmax_n(score),   context[h] = sum_n p[h, n] W_v[h] y[n]

W_k and the norm's weight move onto the query and W_v behind the sum, so that the tokens meet two products with (H, C)
instead of two (C, C) projections. The norm's bias shifts all scores of a head alike and cancels: its gradient is zero.
Source: weight absorption as in DeepSeek-V2, arXiv:2405.04434, here for a pooled query; CaiT, arXiv:2103.17239.
B images, N tokens (each stream has its own N), C width, H heads, D head width.

One program per image and stream reads the tokens once, forward and backward. A tile of tokens is cut into chunks of
columns, [WARPS, TOKENS, WIDTH]. Each warp multiplies its own columns, so the products share no operands; only sums over
columns, [TOKENS, HEADS], cross warps. HEADS is H + 1 padded to a block: row h of the keys is scale log2(e) norm_weight
absorbed[h], and row H is all ones, so that its product with a token is the sum that the token's mean takes. Scores are
in units of log 2. With KEEP the factors of all products stay on chip, without it they are read again where needed.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fusionreid.kernels._path import capability, on_device_of, use_triton

FP32 = torch.finfo(torch.float32)
LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))
MOST_SUMS = 2**14  # that a program of the kernels holds: heads, padded, times width


class ClassStream(NamedTuple):
    """One projected class token per image, the tokens it attends over, and the weights in between."""

    query: Tensor  # (B, H, D)
    tokens: Tensor  # (B, N, C)
    norm_weight: Tensor  # (C,) of the LayerNorm before the key projection; values come from the tokens as they are
    norm_bias: Tensor  # (C,)
    norm_eps: float
    key_weight: Tensor  # (H * D, C)
    value_weight: Tensor  # (H * D, C)


class Saved(NamedTuple):
    """One stream's results of the forward kernel that its backward kernel needs, all float32."""

    pooled: Any  # (B, H, C), not yet rounded to the dtype of the tokens
    scores: Any  # (B, N, HEADS)
    moments: Any  # (B, 2, N): each token's mean and reciprocal deviation
    sums: Any  # (B, 3, HEADS): each head's highest score, the reciprocal sum of its softmax, the sum of its key


class Rows(NamedTuple):
    """A (B, rows, C) tensor as a kernel takes it, columns next to each other."""

    ptr: Any
    image_stride: int
    row_stride: int


class ForwardStream(NamedTuple):
    """One stream's arguments of the forward kernel."""

    num_tokens: int
    tokens: Rows
    absorbed: Rows
    weight: Any
    eps: float
    pooled: Any
    saved: Saved


class BackwardStream(NamedTuple):
    """One stream's arguments of the backward kernel."""

    num_tokens: int
    tokens: Rows
    absorbed: Rows
    weight: Any
    saved: Saved
    slope: Rows  # the gradient of pooled
    d_tokens: Any
    d_absorbed: Any
    d_weight: Any  # (B, C), of each image


@overload
def dual_cross_attention(a: ClassStream, b: None = None, scale: float | None = None) -> Tensor: ...
@overload
def dual_cross_attention(a: ClassStream, b: ClassStream, scale: float | None = None) -> tuple[Tensor, Tensor]: ...
def dual_cross_attention(
    a: ClassStream, b: ClassStream | None = None, scale: float | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The context (B, H * D) of each stream, in the query's dtype. `scale` is 1 / sqrt(D) unless given.

    Autocast is ignored: norm statistics, softmax and all sums are in float32 at least. On a GPU the factors of products
    have the dtype of the tokens, on a CPU that of the sums. Raises ValueError where a shape, dtype, device, the scale
    or an epsilon is wrong, or where the heads and their width are more than a program holds.
    """
    streams = (a,) if b is None else (a, b)
    for stream in streams:
        _check(stream)
    if b is not None and (
        a.query.shape != b.query.shape or (a.tokens.dtype, a.tokens.device) != (b.tokens.dtype, b.tokens.device)
    ):
        raise ValueError(
            "dual_cross_attention: both streams must have the same images, heads and head width, and dtype and device "
            f"of tokens, got queries {tuple(a.query.shape)} and {tuple(b.query.shape)}, {a.tokens.dtype} on "
            f"{a.tokens.device} and {b.tokens.dtype} on {b.tokens.device}"
        )
    if scale is None:
        scale = a.query.shape[2] ** -0.5
    elif not abs(scale) <= FP32.max / 2:
        raise ValueError(f"dual_cross_attention: scale must be finite in float32, got {scale}")
    with torch.autocast("cuda" if a.tokens.is_cuda else "cpu", enabled=False):
        contexts = _attend_on_gpu(streams, scale) if use_triton(a.tokens) else [_attend(s, scale) for s in streams]
    return contexts[0] if b is None else (contexts[0], contexts[1])


def _check(stream: ClassStream) -> None:
    if stream.query.ndim != 3 or stream.tokens.ndim != 3 or stream.query.shape[0] != stream.tokens.shape[0]:
        raise ValueError(
            "dual_cross_attention: query must be (B, H, D) and tokens (B, N, C), "
            f"got {tuple(stream.query.shape)} and {tuple(stream.tokens.shape)}"
        )
    if not stream.query.numel() or not stream.tokens.numel():
        raise ValueError(
            "dual_cross_attention: needs one image, head and token or more, "
            f"got query {tuple(stream.query.shape)} and tokens {tuple(stream.tokens.shape)}"
        )
    width, inner = stream.tokens.shape[2], stream.query.shape[1] * stream.query.shape[2]
    vector, matrix = (width,), (inner, width)
    names = ("norm_weight", "norm_bias", "key_weight", "value_weight")
    for name, shape in zip(names, (vector, vector, matrix, matrix)):
        if (got := tuple(getattr(stream, name).shape)) != shape:
            raise ValueError(f"dual_cross_attention: {name} must be {shape}, got {got}")
    for name in ("query", "tokens", *names):
        tensor = getattr(stream, name)
        if not tensor.is_floating_point() or tensor.device != stream.tokens.device:
            raise ValueError(
                f"dual_cross_attention: {name} must be floating and on {stream.tokens.device} as the tokens are, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if not 0 <= stream.norm_eps <= FP32.max:
        raise ValueError(f"dual_cross_attention: norm_eps must be finite and not below 0, got {stream.norm_eps}")


def _attend(stream: ClassStream, scale: float) -> Tensor:
    heads = stream.query.shape[1:]
    exact = torch.promote_types(stream.tokens.dtype, torch.float32)
    query, tokens = stream.query.to(exact), stream.tokens.to(exact)
    norm_weight, norm_bias = stream.norm_weight.to(exact), stream.norm_bias.to(exact)
    key_weight, value_weight = (w.to(exact).unflatten(0, heads) for w in (stream.key_weight, stream.value_weight))
    absorbed = torch.einsum("bhd,hdc->bhc", query, key_weight) * (scale * norm_weight)
    keys = F.layer_norm(tokens, tokens.shape[-1:], eps=stream.norm_eps)
    scores = absorbed @ keys.transpose(1, 2) + 0 * norm_bias.sum()  # (B, H, N); the bias gets zeros, not None
    pooled = scores.softmax(-1) @ tokens  # (B, H, C)
    return torch.einsum("bhc,hdc->bhd", pooled, value_weight).flatten(1).to(stream.query.dtype)


def _attend_on_gpu(streams: Sequence[ClassStream], scale: float) -> list[Tensor]:
    """One launch for both streams, between the products with the weights; streams of different widths go alone."""
    if streams[0].tokens.shape[2] != streams[-1].tokens.shape[2]:
        return [_attend_on_gpu([stream], scale)[0] for stream in streams]
    dtype, heads = streams[0].tokens.dtype, streams[0].query.shape[1:]
    key_weights = [s.key_weight.to(dtype).view(*heads, -1) for s in streams]  # (H, D, C)
    value_weights = [s.value_weight.to(dtype).view(*heads, -1) for s in streams]
    absorbed = [torch.einsum("bhd,hdc->bhc", s.query.to(dtype), w) for s, w in zip(streams, key_weights)]
    tokens, norm_biases = [s.tokens for s in streams], [s.norm_bias for s in streams]
    norm_weights, norm_eps = [s.norm_weight.contiguous() for s in streams], [s.norm_eps for s in streams]
    differentiable = any(x.requires_grad for x in (*tokens, *absorbed, *norm_weights, *norm_biases))
    needs_grad = torch.is_grad_enabled() and differentiable
    pooled = _forward(tokens, absorbed, norm_weights, norm_biases, norm_eps, scale, needs_grad)
    contexts = [torch.einsum("bhc,hdc->bhd", x, w).flatten(1) for x, w in zip(pooled, value_weights)]
    return [context.to(s.query.dtype) for context, s in zip(contexts, streams)]


@torch.library.custom_op("fusionreid::class_attention", mutates_args=())
def _forward(
    tokens: Sequence[Tensor],
    absorbed: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    norm_eps: Sequence[float],
    scale: float,
    save: bool,
) -> list[Tensor]:
    """The pooled tokens (B, H, C) of each stream, then, if they are to be saved, each stream's `Saved`."""
    results = _empty_results(tokens, absorbed, norm_weights, norm_biases, norm_eps, scale, save)
    pooled = results[: len(tokens)]
    saved = _saved(results[len(tokens) :]) if save else [Saved(out, out, out, out) for out in pooled]
    streams = [
        ForwardStream(x.shape[1], _rows(x), _rows(query), weight, eps, out, kept)
        for x, query, weight, eps, out, kept in zip(tokens, absorbed, norm_weights, norm_eps, pooled, saved)
    ]
    with on_device_of(tokens[0]):
        grid, settings = _launch(tokens[0], absorbed)
        stages = 1 if not settings["KEEP"] else 2 if capability() // 10 == 10 else 3  # without spills
        forward_kernel[grid](streams[0], streams[-1], scale * LOG2_E, SAVE=save, STAGES=stages, **settings)
    return results


@_forward.register_fake
def _empty_results(
    tokens: Sequence[Tensor],
    absorbed: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    norm_eps: Sequence[float],
    scale: float,
    save: bool,
) -> list[Tensor]:
    results = [query.new_empty(query.shape) for query in absorbed]
    if save:
        for x, query in zip(tokens, absorbed):
            images, count, heads = x.shape[0], x.shape[1], _padded_heads(query.shape[1])
            shapes = Saved(query.shape, (images, count, heads), (images, 2, count), (images, 3, heads))
            results += [x.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return results


def _saved(tensors: Sequence[Tensor]) -> list[Saved]:
    width = len(Saved._fields)
    return [Saved(*tensors[i : i + width]) for i in range(0, len(tensors), width)]


@torch.library.custom_op("fusionreid::class_attention_backward", mutates_args=())
def _backward(
    tokens: Sequence[Tensor],
    absorbed: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    scale: float,
) -> list[Tensor]:
    """The gradients of all tokens, then of what the queries absorbed, then of the norms' weights."""
    d_tokens = [x.new_empty(x.shape) for x in tokens]
    d_absorbed = [query.new_empty(query.shape) for query in absorbed]
    d_weights = [x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32) for x in tokens]  # of each image
    streams = [
        BackwardStream(x.shape[1], _rows(x), _rows(query), weight, kept, _rows(grad), *found)
        for x, query, weight, kept, grad, *found in zip(
            tokens, absorbed, norm_weights, _saved(saved), grads, d_tokens, d_absorbed, d_weights
        )
    ]
    with on_device_of(tokens[0]):
        grid, settings = _launch(tokens[0], absorbed)
        stages = 2 if settings["KEEP"] else 1
        mask = capability() // 10 != 9  # without spills on either side
        backward_kernel[grid](streams[0], streams[-1], scale * LOG2_E, STAGES=stages, MASK=mask, **settings)
    return [*d_tokens, *d_absorbed, *(x.sum(0).to(w.dtype) for x, w in zip(d_weights, norm_weights))]


@_backward.register_fake
def _(tokens: Sequence[Tensor], absorbed: Sequence[Tensor], norm_weights: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (*tokens, *absorbed, *norm_weights)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tokens, absorbed, norm_weights, norm_biases, _, ctx.scale, _ = inputs
    ctx.save_for_backward(*tokens, *absorbed, *norm_weights, *norm_biases, *output[len(tokens) :])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    n = len(tensors) // (4 + len(Saved._fields))  # streams
    tokens, absorbed, norm_weights, norm_biases = (tensors[i * n : i * n + n] for i in range(4))
    slopes = [torch.zeros_like(query) if grad is None else grad for grad, query in zip(grads, absorbed)]
    found = _backward(tokens, absorbed, norm_weights, tensors[4 * n :], slopes, ctx.scale)
    d_biases = [torch.zeros_like(bias) for bias in norm_biases]  # a bias moves all scores of a head alike
    return found[:n], found[n : 2 * n], found[2 * n :], d_biases, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _rows(x: Tensor) -> Rows:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Rows(x, *x.stride()[:2])


def _padded_heads(heads: int) -> int:
    return max(16, triton.next_power_of_2(heads + 1))


def _launch(tokens: Tensor, absorbed: Sequence[Tensor]) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and settings. Where the factors do not fit on chip beside the sums, they are read again where needed: those
    of 4 bytes, and all on GPUs whose programs have 99 KiB of shared memory (8.6, 8.9, 12.0) and not 163 or more."""
    images, heads, width = absorbed[0].shape
    padded = _padded_heads(heads)
    if padded * width > MOST_SUMS:
        raise ValueError(
            f"dual_cross_attention: on a GPU the padded heads times the width are at most {MOST_SUMS}, "
            f"got {heads} heads padded to {padded} and width {width}"
        )
    settings = {"H": heads, "HEADS": padded, "C": width, "TOKENS": 16}
    has_room = capability() == 80 or capability() // 10 in (9, 10)
    if tokens.element_size() == 4 or not has_room:
        settings |= {"WARPS": 8, "WIDTH": 16, "KEEP": False, "num_warps": 8}
    else:
        settings |= {"WARPS": 4, "WIDTH": 32, "KEEP": True, "num_warps": 4}
    return (images, len(absorbed)), settings


@triton.jit
def forward_kernel(
    a, b, multiplier,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Grid (B, streams): pooled[h] = softmax_n(score[h, n]) tokens[n], softmax online, sums in float32."""
    stream = b
    if tl.program_id(1) == 0:
        stream = a
    count, weight = stream.num_tokens, stream.weight
    image = tl.program_id(0).to(tl.int64)
    tokens, token_stride = stream.tokens.ptr + image * stream.tokens.image_stride, stream.tokens.row_stride
    absorbed, head_stride = stream.absorbed.ptr + image * stream.absorbed.image_stride, stream.absorbed.row_stride
    dtype: tl.constexpr = tokens.dtype.element_ty
    head = tl.arange(0, HEADS)
    CHUNKS: tl.constexpr = (C + WARPS * WIDTH - 1) // (WARPS * WIDTH)

    keys: tl.tuple = ()
    context: tl.tuple = ()
    origin = tl.zeros([HEADS], tl.float32)
    key_sums = tl.zeros([WARPS, HEADS, WIDTH], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        key = _load_key(absorbed, weight, multiplier, origin, head_stride, dtype, chunk, H, HEADS, C, WARPS, WIDTH)
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
                values = _load_tokens(tokens, first, count, token_stride, chunk, C, TOKENS, WARPS, WIDTH, not KEEP)
                products = tl.dot(values, tl.permute(keys[chunk], (0, 2, 1)), products)
                squares += _squared_distance(values, anchor, chunk, C, WARPS, WIDTH)
                tile += (values,)
        else:
            for block in tl.range(CHUNKS, num_stages=1):
                values = _load_tokens(tokens, first, count, token_stride, block, C, TOKENS, WARPS, WIDTH, not KEEP)
                key = _load_key(
                    absorbed, weight, multiplier, origin, head_stride, dtype, block, H, HEADS, C, WARPS, WIDTH
                )
                products = tl.dot(values, tl.permute(key, (0, 2, 1)), products, input_precision="tf32x3")
                squares += _squared_distance(values, anchor, block, C, WARPS, WIDTH)
        products = tl.sum(products, 0)  # [TOKENS, HEADS]
        mean = tl.sum(tl.where(head[None, :] == H, products, 0.0), 1) / C
        variance = tl.sum(tl.sum(squares, 2), 0) / C - (mean - anchor) * (mean - anchor)
        rstd = tl.rsqrt(tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL) + stream.eps)
        scores = rstd[:, None] * (products - mean[:, None] * key_sums[None, :])
        if SAVE:
            moments = stream.saved.moments + image * 2 * count + token
            tl.store(moments, mean, mask=valid)
            tl.store(moments + count, rstd, mask=valid)
            row = stream.saved.scores + (image * count + token) * HEADS
            tl.store(row[:, None] + head[None, :], scores, mask=valid[:, None])
        scores = tl.where(valid[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 0))
        decay = tl.exp2(highest - higher)
        share = tl.exp2(scores - higher[None, :]).to(dtype)
        total = total * decay + tl.sum(share.to(tl.float32), 0)  # of the rounded ones: with them the weights sum to 1
        highest = higher
        share = tl.broadcast_to(tl.trans(share)[None], [WARPS, HEADS, TOKENS])
        summed: tl.tuple = ()
        for chunk in tl.static_range(CHUNKS):
            if KEEP:
                values = tile[chunk]
            else:
                values = _load_tokens(tokens, first, count, token_stride, chunk, C, TOKENS, WARPS, WIDTH, not KEEP)
            kept = context[chunk] * decay[None, :, None]
            summed += (tl.dot(share, values, kept, input_precision="tf32x3"),)
        context = summed

    if SAVE:
        sums = stream.saved.sums + image * 3 * HEADS + head
        tl.store(sums, highest)
        tl.store(sums + HEADS, 1 / total)
        tl.store(sums + 2 * HEADS, key_sums)
    for chunk in tl.static_range(CHUNKS):
        pooled = context[chunk] * (1 / total)[None, :, None]
        at = image * H * C
        _store_tile(stream.pooled + at, pooled, head, head < H, C, chunk, C, WARPS, WIDTH)
        if SAVE:
            _store_tile(stream.saved.pooled + at, pooled, head, head < H, C, chunk, C, WARPS, WIDTH)


@triton.jit
def backward_kernel(
    a, b, multiplier,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Grid (B, streams). With ds = share (slope . token - slope . pooled), per token, r its reciprocal deviation and m
    its mean:

    d_key[h] = sum_n ds r (token - m)
    d_token = sum_h (share slope[h] + ds r (key[h] - its mean)) - r^2 (token - m) sum_h (ds score) / C
    """
    stream = b
    if tl.program_id(1) == 0:
        stream = a
    count, weight, saved = stream.num_tokens, stream.weight, stream.saved
    image = tl.program_id(0).to(tl.int64)
    tokens, token_stride = stream.tokens.ptr + image * stream.tokens.image_stride, stream.tokens.row_stride
    absorbed, head_stride = stream.absorbed.ptr + image * stream.absorbed.image_stride, stream.absorbed.row_stride
    slope, slope_stride = stream.slope.ptr + image * stream.slope.image_stride, stream.slope.row_stride
    d_tokens = stream.d_tokens + image * count * C
    dtype: tl.constexpr = tokens.dtype.element_ty
    head = tl.arange(0, HEADS)
    CHUNKS: tl.constexpr = (C + WARPS * WIDTH - 1) // (WARPS * WIDTH)

    sums = saved.sums + image * 3 * HEADS + head
    highest, inverse, key_mean = tl.load(sums), tl.load(sums + HEADS), tl.load(sums + 2 * HEADS) / C
    keys: tl.tuple = ()
    slopes: tl.tuple = ()
    d_keys: tl.tuple = ()
    delta = tl.zeros([WARPS, HEADS, WIDTH], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        upstream = _load_tile(slope, head, head < H, slope_stride, chunk, C, WARPS, WIDTH)
        pooled = _load_tile(saved.pooled + image * H * C, head, head < H, C, chunk, C, WARPS, WIDTH)
        delta += upstream.to(tl.float32) * pooled
        if KEEP:
            key = _load_key(
                absorbed, weight, multiplier, key_mean, head_stride, dtype, chunk, H, HEADS, C, WARPS, WIDTH
            )
            keys += (key,)
            slopes += (upstream,)
        d_keys += (tl.zeros([WARPS, HEADS, WIDTH], tl.float32),)
    delta = tl.sum(tl.sum(delta, 2), 0)  # [HEADS]

    for first in tl.range(0, count, TOKENS, num_stages=STAGES):
        token = first + tl.arange(0, TOKENS)
        valid = token < count
        no_later = tl.minimum(token, count - 1)
        moments = saved.moments + image * 2 * count + no_later
        mean, rstd = tl.load(moments, mask=valid, other=0.0), tl.load(moments + count, mask=valid, other=0.0)
        row = saved.scores + (image * count + no_later) * HEADS
        scores = tl.load(row[:, None] + head[None, :])
        d_share = tl.zeros([WARPS, TOKENS, HEADS], tl.float32)
        tile: tl.tuple = ()
        if KEEP:
            for chunk in tl.static_range(CHUNKS):
                values = _load_tokens(tokens, first, count, token_stride, chunk, C, TOKENS, WARPS, WIDTH, MASK)
                d_share = tl.dot(values, tl.permute(slopes[chunk], (0, 2, 1)), d_share)
                tile += (values,)
        else:
            for block in tl.range(CHUNKS, num_stages=1):
                values = _load_tokens(tokens, first, count, token_stride, block, C, TOKENS, WARPS, WIDTH, MASK)
                upstream = _load_tile(slope, head, head < H, slope_stride, block, C, WARPS, WIDTH)
                d_share = tl.dot(values, tl.permute(upstream, (0, 2, 1)), d_share, input_precision="tf32x3")
        d_share = tl.sum(d_share, 0)  # [TOKENS, HEADS]
        # tokens past the last have a share here, but a rstd of 0, so no d_scores
        share = tl.where((head < H)[None, :], tl.exp2(scores - highest[None, :]) * inverse[None, :], 0.0)
        # a share of 1 has no slope; what the difference shows there is rounding
        d_scores = tl.where(share == 1, 0.0, share * (d_share - delta[None, :]) * LN_2)
        d_scores = (d_scores * rstd[:, None]).to(dtype)
        shrink = (tl.sum(d_scores.to(tl.float32) * scores, 1) * rstd / C).to(dtype).to(tl.float32)
        shift = mean * shrink
        diagonal = tl.arange(0, TOKENS)[:, None] == tl.arange(0, TOKENS)[None, :]
        diagonal = tl.where(diagonal, -shrink[:, None], 0.0).to(dtype)
        diagonal = tl.broadcast_to(diagonal[None], [WARPS, TOKENS, TOKENS])
        share = tl.broadcast_to(share.to(dtype)[None], [WARPS, TOKENS, HEADS])
        by_head = tl.broadcast_to(tl.trans(d_scores)[None], [WARPS, HEADS, TOKENS])
        by_token = tl.broadcast_to(d_scores[None], [WARPS, TOKENS, HEADS])
        if not KEEP:
            for block in tl.range(CHUNKS, num_stages=1):
                values = _load_tokens(tokens, first, count, token_stride, block, C, TOKENS, WARPS, WIDTH, MASK)
                upstream = _load_tile(slope, head, head < H, slope_stride, block, C, WARPS, WIDTH)
                key = _load_key(
                    absorbed, weight, multiplier, key_mean, head_stride, dtype, block, H, HEADS, C, WARPS, WIDTH
                )
                d_values = _token_gradient(share, upstream, by_token, key, diagonal, values, shift)
                _store_tile(d_tokens, d_values, token, valid, C, block, C, WARPS, WIDTH)
        summed: tl.tuple = ()
        for chunk in tl.static_range(CHUNKS):
            if KEEP:
                values = tile[chunk]
            else:
                values = _load_tokens(tokens, first, count, token_stride, chunk, C, TOKENS, WARPS, WIDTH, MASK)
            if KEEP:
                d_values = _token_gradient(share, slopes[chunk], by_token, keys[chunk], diagonal, values, shift)
                _store_tile(d_tokens, d_values, token, valid, C, chunk, C, WARPS, WIDTH)
            summed += (tl.dot(by_head, values, d_keys[chunk], input_precision="tf32x3"),)
        d_keys = summed

    centre = tl.zeros([WARPS, HEADS, WIDTH], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        centre += d_keys[chunk]
    centre = tl.sum(tl.sum(centre, 2), 0) / C  # [HEADS]: sum_n ds r m, since columns past C are zero
    for chunk in tl.static_range(CHUNKS):
        columns = _columns_of(chunk, WARPS, WIDTH)
        d_key = d_keys[chunk] - centre[None, :, None]
        scaled = d_key * _load_weight(weight, multiplier, chunk, C, WARPS, WIDTH)
        _store_tile(stream.d_absorbed + image * H * C, scaled, head, head < H, C, chunk, C, WARPS, WIDTH)
        query = _load_tile(absorbed, head, head < H, head_stride, chunk, C, WARPS, WIDTH).to(tl.float32)
        d_weight = tl.sum(query * d_key, 1)[:, None, :] * multiplier
        tl.store(stream.d_weight + image * C + columns, d_weight, mask=columns < C)


@triton.jit
def _token_gradient(share, slope, by_token, key, diagonal, values, shift):
    sums = tl.broadcast_to(shift[None, :, None], values.shape)
    sums = tl.dot(share, slope, sums, input_precision="tf32x3")
    sums = tl.dot(by_token, key, sums, input_precision="tf32x3")
    return tl.dot(diagonal, values, sums, input_precision="tf32x3")  # [WARPS, TOKENS, WIDTH]


@triton.jit
def _columns_of(chunk, WARPS: tl.constexpr, WIDTH: tl.constexpr):
    within = tl.arange(0, WARPS)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return chunk * WARPS * WIDTH + within  # [WARPS, 1, WIDTH]


@triton.jit
def _load_tile(ptr, rows, mask, stride, chunk, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr):
    columns = _columns_of(chunk, WARPS, WIDTH)
    mask = mask[None, :, None]
    if C % (WARPS * WIDTH) != 0:
        mask = mask & (columns < C)
    return tl.load(ptr + rows[None, :, None] * stride + columns, mask=mask, other=0.0)  # [WARPS, len(rows), WIDTH]


@triton.jit
def _load_tokens(
    ptr, first, count, stride, chunk,
    C: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """[WARPS, TOKENS, WIDTH]; with a MASK those past the last are zero, without it they are the last once more."""
    token = first + tl.arange(0, TOKENS)
    if MASK:
        return _load_tile(ptr, token, token < count, stride, chunk, C, WARPS, WIDTH)
    columns = _columns_of(chunk, WARPS, WIDTH)
    at = ptr + tl.minimum(token, count - 1)[None, :, None] * stride + columns
    if C % (WARPS * WIDTH) == 0:
        return tl.load(at)
    return tl.load(at, mask=columns < C, other=0.0)


@triton.jit
def _store_tile(ptr, value, rows, mask, stride, chunk, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr):
    columns = _columns_of(chunk, WARPS, WIDTH)
    mask = mask[None, :, None]
    if C % (WARPS * WIDTH) != 0:
        mask = mask & (columns < C)
    tl.store(ptr + rows[None, :, None] * stride + columns, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_weight(ptr, multiplier, chunk, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr):
    columns = _columns_of(chunk, WARPS, WIDTH)
    return tl.load(ptr + columns, mask=columns < C, other=0.0).to(tl.float32) * multiplier


@triton.jit
def _load_key(
    absorbed, weight, multiplier, centre, head_stride, dtype: tl.constexpr, chunk,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS)
    key = _load_tile(absorbed, head, head < H, head_stride, chunk, C, WARPS, WIDTH).to(tl.float32)
    key = key * _load_weight(weight, multiplier, chunk, C, WARPS, WIDTH)
    key = tl.where(head[None, :, None] == H, 1.0, key)
    return (key - centre[None, :, None]).to(dtype)  # [WARPS, HEADS, WIDTH]


@triton.jit
def _squared_distance(values, anchor, chunk, C: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr):
    distance = values.to(tl.float32) - anchor[None, :, None]
    if C % (WARPS * WIDTH) != 0:
        distance = tl.where(_columns_of(chunk, WARPS, WIDTH) < C, distance, 0.0)
    return distance * distance  # [WARPS, TOKENS, WIDTH]
