"""Self-attention of one or two token streams:  y = softmax(q k^T * scale) v, per image and head.

Source: Vaswani et al., Attention Is All You Need, arXiv:1706.03762; two streams as in FusionReID, arXiv:2412.17239.
B images, N tokens (each stream has its own N), H heads, D head width; q, k, v packed as the projection leaves them.
"""

from typing import overload

import torch.nn.functional as F
from torch import Tensor


@overload
def dual_self_attention(qkv_a: Tensor, qkv_b: None = None, scale: float | None = None) -> Tensor: ...
@overload
def dual_self_attention(qkv_a: Tensor, qkv_b: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]: ...
def dual_self_attention(
    qkv_a: Tensor, qkv_b: Tensor | None = None, scale: float | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Each qkv is (B, N, 3, H, D); the answer (B, N, H * D), or a pair of them. `scale` is 1 / sqrt(D) unless given."""
    _check(qkv_a, "qkv_a")
    if qkv_b is None:
        return _attend(qkv_a, scale)
    _check(qkv_b, "qkv_b")
    if qkv_a.shape[0] != qkv_b.shape[0] or qkv_a.shape[2:] != qkv_b.shape[2:]:
        raise ValueError(
            "dual_self_attention: both streams must have the same images, heads and head width, "
            f"got {tuple(qkv_a.shape)} and {tuple(qkv_b.shape)}"
        )
    return _attend(qkv_a, scale), _attend(qkv_b, scale)


def _check(qkv: Tensor, name: str) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"dual_self_attention: {name} must be (B, N, 3, H, D), got {tuple(qkv.shape)}")


def _attend(qkv: Tensor, scale: float | None) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # views (B, H, N, D)
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)
