"""Pre-norm Transformer block of T2T-ViT and of the encoding unit; the ViT uses its attention too.

Source: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv:2010.11929. B images, N tokens, C width, H heads.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fusionreid.drop_path import DropPath
from fusionreid.kernels import dual_self_attention


class SelfAttention(nn.Module):
    """Multi-head self-attention. `scale` is 1 / sqrt(head width) unless given."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool,
        scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"SelfAttention: width must be a multiple of heads, got width {width} and {heads} heads")
        self.heads, self.scale, self.attention_dropout = heads, scale, attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def project(self, x: Tensor) -> Tensor:
        """Project tokens (B, N, C) to packed queries, keys and values (B, N, 3, H, D)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the tokens (B, N, C) of each image; the shape stays."""
        qkv = self.project(x)
        if self.training and self.attention_dropout > 0:
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(
                query, key, value, dropout_p=self.attention_dropout, scale=self.scale
            ).transpose(1, 2)
            return self.drop(self.proj(y.flatten(2)))
        return self.drop(self.proj(dual_self_attention(qkv, scale=self.scale)))


class Mlp(nn.Module):
    """Two linear layers around the exact GELU."""

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token (..., C) on its own; the shape stays."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Transformer block: x + attention(norm(x)), then x + mlp(norm(x)); `drop_path` drops a branch of an image."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool,
        norm_eps: float,
        drop_path: float = 0.0,
        scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = SelfAttention(
            width, heads, qkv_bias=qkv_bias, scale=scale, dropout=dropout, attention_dropout=attention_dropout
        )
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout=dropout)
        self.drop_path1, self.drop_path2 = (DropPath(drop_path) if drop_path > 0 else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (B, N, C); the shape stays."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))
