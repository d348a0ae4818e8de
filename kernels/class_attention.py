"""Class attention of one or two streams: a class token attends over tokens whose keys and values are never projected.

score[h, n] = scale q[h] . W_k[h] LN(y[n]),   p = softmax_n(score),   context[h] = sum_n p[h, n] W_v[h] y[n]

W_k and the norm's weight move onto the query and W_v behind the sum, so that the tokens meet two products with (H, C)
instead of two (C, C) projections. The norm's bias shifts all scores of a head alike and cancels: its gradient is zero.
Source: weight absorption as in DeepSeek-V2, arXiv:2405.04434, here for a pooled query; CaiT, arXiv:2103.17239.
B images, N tokens (each stream has its own N), C width, H heads, D head width.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fusionreid.kernels._path import capability, on_device_of, use_triton
from fusionreid.kernels.class_attention_backward import backward
from fusionreid.kernels.class_attention_forward import forward

LOG2_E = math.log2(math.e)
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


@overload
def dual_cross_attention(a: ClassStream, b: None = None, scale: float | None = None) -> Tensor: ...
@overload
def dual_cross_attention(a: ClassStream, b: ClassStream, scale: float | None = None) -> tuple[Tensor, Tensor]: ...
def dual_cross_attention(
    a: ClassStream, b: ClassStream | None = None, scale: float | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The context (B, H * D) of each stream, in the query's dtype. `scale` is 1 / sqrt(D) unless given.

    Autocast is ignored: norm statistics, softmax and all sums are in float32 at least. On a GPU the factors of products
    have the dtype of the tokens, on a CPU that of the sums.
    """
    streams = (a,) if b is None else (a, b)
    for stream in streams:
        _check(stream)
    if b is not None and (a.query.shape != b.query.shape or a.tokens.dtype != b.tokens.dtype):
        raise ValueError(
            "dual_cross_attention: both streams must have the same images, heads and head width, and type of tokens, "
            f"got queries {tuple(a.query.shape)} and {tuple(b.query.shape)}, {a.tokens.dtype} and {b.tokens.dtype}"
        )
    if scale is None:
        scale = a.query.shape[2] ** -0.5
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
    key_weights = [s.key_weight.to(dtype).reshape(*heads, -1) for s in streams]  # (H, D, C)
    value_weights = [s.value_weight.to(dtype).reshape(*heads, -1) for s in streams]
    absorbed = [torch.einsum("bhd,hdc->bhc", s.query.to(dtype), w) for s, w in zip(streams, key_weights)]
    tokens, norm_biases, norm_eps = (
        [getattr(s, name) for s in streams] for name in ("tokens", "norm_bias", "norm_eps")
    )
    norm_weights = [s.norm_weight.contiguous() for s in streams]
    differentiable = any(x.requires_grad for x in (*tokens, *absorbed, *norm_weights, *norm_biases))
    needs_grad = torch.is_grad_enabled() and differentiable
    pooled = _forward(tokens, absorbed, norm_weights, norm_biases, norm_eps, scale, needs_grad)
    contexts = [torch.einsum("bhc,hdc->bhd", x, w).flatten(1) for x, w in zip(pooled, value_weights)]
    return [context.to(s.query.dtype) for context, s in zip(contexts, streams)]


@torch.library.custom_op("fusionreid::class_attention", mutates_args=())
def _forward(
    tokens: Sequence[Tensor], absorbed: Sequence[Tensor], norm_weights: Sequence[Tensor], norm_biases: Sequence[Tensor],
    norm_eps: Sequence[float], scale: float, save: bool,
) -> list[Tensor]:  # fmt: skip
    """The pooled tokens (B, H, C) of each stream, then, if they are to be saved, the traces (B, N + 3, HEADS)."""
    results = _empty_results(tokens, absorbed, norm_weights, norm_biases, norm_eps, scale, save)
    pooled, traces = results[: len(tokens)], results[len(tokens) :] or results
    streams = [(*_rows(x), *rest) for x, *rest in zip(tokens, absorbed, norm_weights, norm_eps, pooled, traces)]
    with on_device_of(tokens[0]):
        grid, settings = _launch(tokens, absorbed)
        forward[grid](streams[0], streams[-1], scale * LOG2_E, *absorbed[0].stride()[:2], TRACE=save, **settings)
    return results


@_forward.register_fake
def _empty_results(
    tokens: Sequence[Tensor], absorbed: Sequence[Tensor], norm_weights: Sequence[Tensor], norm_biases: Sequence[Tensor],
    norm_eps: Sequence[float], scale: float, save: bool,
) -> list[Tensor]:  # fmt: skip
    pooled = [query.new_empty(query.shape) for query in absorbed]
    heads = _padded_heads(absorbed[0].shape[1])
    traces = [x.new_empty(x.shape[0], x.shape[1] + 3, heads, dtype=torch.float32) for x in tokens]
    return pooled + traces if save else pooled


@torch.library.custom_op("fusionreid::class_attention_backward", mutates_args=())
def _backward(
    tokens: Sequence[Tensor], absorbed: Sequence[Tensor], norm_weights: Sequence[Tensor], pooled: Sequence[Tensor],
    traces: Sequence[Tensor], grads: Sequence[Tensor], scale: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of all tokens, then of what the queries absorbed, then of the norms' weights."""
    grads = _alike(grads)
    of_tokens = [x.new_empty(x.shape) for x in tokens]
    of_absorbed = [torch.empty_like(query) for query in absorbed]
    of_weights = [x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32) for x in tokens]  # by each image
    streams = [
        (*_rows(x), *rest)
        for x, *rest in zip(tokens, absorbed, norm_weights, pooled, traces, grads, of_tokens, of_absorbed, of_weights)
    ]
    strides = *absorbed[0].stride()[:2], *grads[0].stride()[:2]
    with on_device_of(tokens[0]):
        grid, settings = _launch(tokens, absorbed)
        backward[grid](streams[0], streams[-1], scale * LOG2_E, *strides, **settings)
    return [*of_tokens, *of_absorbed, *(x.sum(0).to(w.dtype) for x, w in zip(of_weights, norm_weights))]


@_backward.register_fake
def _(tokens: Sequence[Tensor], absorbed: Sequence[Tensor], norm_weights: Sequence[Tensor], *_: Any) -> list[Tensor]:
    of_tokens = [x.new_empty(x.shape) for x in tokens]
    return [*of_tokens, *map(torch.empty_like, absorbed), *(w.new_empty(w.shape) for w in norm_weights)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tokens, absorbed, norm_weights, norm_biases, _, ctx.scale, _ = inputs
    ctx.save_for_backward(*tokens, *absorbed, *norm_weights, *norm_biases, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    n = len(saved) // 6
    tokens, absorbed, norm_weights, norm_biases, pooled, traces = (saved[i * n : i * n + n] for i in range(6))
    slopes = [torch.zeros_like(y) if grad is None else grad for grad, y in zip(grads, pooled)]
    found = _backward(tokens, absorbed, norm_weights, pooled, traces, slopes, ctx.scale)
    of_biases = [torch.zeros_like(bias) for bias in norm_biases]  # a bias moves all scores of a head alike
    return found[:n], found[n : 2 * n], found[2 * n :], of_biases, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _alike(grads: Sequence[Tensor]) -> list[Tensor]:
    """With the same strides, the last of them 1: as the products with the weights leave them, or copied."""
    strides = {grad.stride() for grad in grads}
    return [grad if len(strides) == 1 and grad.stride(-1) == 1 else grad.contiguous() for grad in grads]


def _rows(tokens: Tensor) -> tuple[Tensor, int, int, int]:
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    return tokens, tokens.shape[1], *tokens.stride()[:2]


def _padded_heads(heads: int) -> int:
    return max(16, triton.next_power_of_2(heads + 2))


def _launch(tokens: Sequence[Tensor], absorbed: Sequence[Tensor]) -> tuple[tuple[int, int], dict[str, Any]]:
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
    if tokens[0].element_size() == 4 or not has_room:
        settings |= {"WARPS": 8, "WIDTH": 16, "STAGES": 1, "KEEP": False, "num_warps": 8}
    else:
        settings |= {"WARPS": 4, "WIDTH": 32, "STAGES": 2, "KEEP": True, "num_warps": 4}
    return (images, len(tokens)), settings
