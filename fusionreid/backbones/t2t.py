"""T2T-ViT-t: patches by two small token transformers instead of one convolution, and a fixed sinusoid position table.

Source: Yuan et al., Tokens-to-Token ViT, arXiv:2101.11986. B images, N tokens, C width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusionreid.backbones.vit import ViT
from fusionreid.blocks import Block, Mlp
from fusionreid.kernels import dual_self_attention

SIZES = {"t2t_vit_t_14": (384, 14, 6), "t2t_vit_t_24": (512, 24, 8)}  # width, blocks, heads
UNFOLDS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding
TOKEN_WIDTH = 64
NORM_EPS = 1e-5


class TokenAttention(nn.Module):
    """One head that narrows the tokens from `in_width` to `width`; the values are the shortcut."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.scale = in_width**-0.5
        self.qkv = nn.Linear(in_width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among tokens (B, N, in_width); the result is (B, N, width)."""
        qkv = self.qkv(x).unflatten(-1, (3, 1, -1))  # (B, N, 3, 1, D)
        return qkv[:, :, 2, 0] + self.proj(dual_self_attention(qkv, scale=self.scale))


class TokenTransformer(nn.Module):
    """Transformer block whose attention narrows the tokens from `in_width` to `width`."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_width, eps=NORM_EPS)
        self.attn = TokenAttention(in_width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (B, N, in_width) to (B, N, width)."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Tokens of a grid 16 times coarser than the image: unfold, attend, fold, twice, then project."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention1 = TokenTransformer(3 * 7 * 7, TOKEN_WIDTH)
        self.attention2 = TokenTransformer(TOKEN_WIDTH * 3 * 3, TOKEN_WIDTH)
        self.project = nn.Linear(TOKEN_WIDTH * 3 * 3, width)

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) into tokens (B, N, C)."""
        x, size = images, (images.shape[2], images.shape[3])
        for unfold, attention in zip(UNFOLDS, (self.attention1, self.attention2, self.project)):
            kernel, stride, padding = unfold
            x = attention(F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2))
            size = unfolded(size, unfold)
            if attention is not self.project:
                x = x.transpose(1, 2).unflatten(2, size)  # (B, C, h, w)
        return x


def unfolded(size: tuple[int, int], unfold: tuple[int, int, int]) -> tuple[int, int]:
    """Return height and width of the grid of windows."""
    kernel, stride, padding = unfold
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
    return height, width


def sinusoid(positions: int, width: int) -> Tensor:
    """Return a table (1, positions, width): sines in even columns, cosines in odd, wavelengths 2 pi to 20000 pi."""
    column = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (column // 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())[None]


class T2TViT(ViT):
    """ViT with tokens from `TokensToToken` (here `patch_embed`) and fixed positions."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        image_size: tuple[int, int],
        drop_path: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        **sie: Any,
    ) -> None:
        grid = image_size
        for unfold in UNFOLDS:
            grid = unfolded(grid, unfold)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        blocks = [
            Block(
                width,
                heads,
                mlp_ratio=3.0,
                qkv_bias=False,
                norm_eps=NORM_EPS,
                drop_path=rate,
                dropout=dropout,
                attention_dropout=attention_dropout,
            )
            for rate in rates
        ]
        super().__init__(
            TokensToToken(width),
            nn.Sequential(*blocks),
            nn.LayerNorm(width, eps=NORM_EPS),
            width=width,
            image_size=image_size,
            grid=grid,
            dropout=dropout,
            **sie,
        )
        self.pos_embed.requires_grad_(False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the ViT does, and fill the position table."""
        super().reset_parameters()
        if not self.pos_embed.is_meta:
            self.pos_embed.copy_(sinusoid(self.pos_embed.shape[1], self.width))


def build_t2t(name: str, *, image_size: tuple[int, int], **options: Any) -> T2TViT:
    """Build `t2t_vit_t_14` or `t2t_vit_t_24`; their stride is fixed, `options` are those of `T2TViT`."""
    return T2TViT(*SIZES[name], image_size=image_size, **options)
