"""Class attention of one or two streams: a class token attends over tokens whose keys and values are never projected.

score[h, n] = scale q[h] . W_k[h] LN(y[n]),   p = softmax_n(score),   context[h] = sum_n p[h, n] W_v[h] y[n]

W_k and the norm's weight move onto the query and W_v behind the sum, so that the tokens meet two products with (H, C)
instead of two (C, C) projections. The norm's bias shifts all scores of a head alike and cancels: its gradient is zero.
Source: weight absorption as in DeepSeek-V2, arXiv:2405.04434, here for a pooled query; CaiT, arXiv:2103.17239.
B images, N tokens (each stream has its own N), C width, H heads, D head width.
"""

from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor


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

    Computed in at least float32 whatever the inputs or autocast say.
    """
    _check(a)
    if b is None:
        return _attend(a, scale)
    _check(b)
    if a.query.shape != b.query.shape:
        raise ValueError(
            "dual_cross_attention: both streams must have the same images, heads and head width, "
            f"got queries {tuple(a.query.shape)} and {tuple(b.query.shape)}"
        )
    return _attend(a, scale), _attend(b, scale)


def _check(stream: ClassStream) -> None:
    if stream.query.ndim != 3 or stream.tokens.ndim != 3 or stream.query.shape[0] != stream.tokens.shape[0]:
        raise ValueError(
            "dual_cross_attention: query must be (B, H, D) and tokens (B, N, C), "
            f"got {tuple(stream.query.shape)} and {tuple(stream.tokens.shape)}"
        )
    width, inner = stream.tokens.shape[2], stream.query.shape[1] * stream.query.shape[2]
    vector, matrix = (width,), (inner, width)
    names = ("norm_weight", "norm_bias", "key_weight", "value_weight")
    for name, shape in zip(names, (vector, vector, matrix, matrix)):
        if (got := tuple(getattr(stream, name).shape)) != shape:
            raise ValueError(f"dual_cross_attention: {name} must be {shape}, got {got}")


def _attend(stream: ClassStream, scale: float | None) -> Tensor:
    heads, head_width = stream.query.shape[1:]
    if scale is None:
        scale = head_width**-0.5
    exact = torch.promote_types(stream.tokens.dtype, torch.float32)
    with torch.autocast("cuda" if stream.tokens.is_cuda else "cpu", enabled=False):
        query, tokens = stream.query.to(exact), stream.tokens.to(exact)
        norm_weight, norm_bias = stream.norm_weight.to(exact), stream.norm_bias.to(exact)
        key_weight = stream.key_weight.to(exact).unflatten(0, (heads, head_width))  # (H, D, C)
        value_weight = stream.value_weight.to(exact).unflatten(0, (heads, head_width))
        absorbed = torch.einsum("bhd,hdc->bhc", query, key_weight) * (scale * norm_weight)
        keys = F.layer_norm(tokens, tokens.shape[-1:], eps=stream.norm_eps)
        scores = absorbed @ keys.transpose(1, 2) + 0 * norm_bias.sum()  # (B, H, N); the bias gets zeros, not None
        pooled = scores.softmax(-1) @ tokens  # (B, H, C)
        return torch.einsum("bhc,hdc->bhd", pooled, value_weight).flatten(1).to(stream.query.dtype)
