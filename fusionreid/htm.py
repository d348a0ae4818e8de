"""HTM, the heterogenous transmission module: two streams exchange what they saw through their class tokens.

Source: FusionReID, arXiv:2412.17239. A pair is always (CNN stream, Transformer stream); B images, N tokens, C width.
Shard and checkpoint whole `HTMLayer`s: they call their parts piecewise, so that one op serves both streams.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from fusionreid.blocks import Block, Mlp
from fusionreid.kernels import ClassStream, dual_cross_attention, dual_self_attention

Pair = tuple[Tensor, Tensor]
Share = Literal["encoder", "none", "fusion", "all"]

HEADS = 12
NORM_EPS = 1e-5


class SEU(nn.Module):
    """The (shared) encoding unit: a Transformer block and a LayerNorm on [class; patches] of one stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = Block(width, HEADS, qkv_bias=False, norm_eps=NORM_EPS)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def project(self, x: Tensor) -> Tensor:
        """Project tokens (B, 1 + N, C) to packed queries, keys and values (B, 1 + N, 3, H, D)."""
        return self.block.attn.project(self.block.norm1(x))  # (B, 1 + N, 3, H, D)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attended values (B, 1 + N, C) to the tokens, transform and normalise them."""
        x = x + self.block.attn.proj(attended)
        return self.norm(x + self.block.mlp(self.block.norm2(x)))


class ClassAttention(nn.Module):
    """Attention of a class token: keys of the normalised tokens, values of the tokens as they are, one bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, cls: Tensor, tokens: Tensor) -> ClassStream:
        """Prepare all but the attention itself, which serves both streams at once; a hook sees what it is made from."""
        query = self.q(cls).unflatten(-1, (HEADS, -1))  # (B, H, D)
        norm = self.norm
        return ClassStream(query, tokens, norm.weight, norm.bias, norm.eps, self.k.weight, self.v.weight)


class MFU(nn.Module):
    """The mutual fusion unit: a class token (B, C) attends over the other stream's patches (B, N, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = ClassAttention(width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, 4 * width)

    def stream(self, cls: Tensor, tokens: Tensor) -> ClassStream:
        """Prepare the class token's attention over the other stream's patches."""
        return self.attn(self.norm1(cls), tokens)

    def finish(self, cls: Tensor, context: Tensor) -> Tensor:
        """Add the attended context (B, C) to the class token (B, C) and transform it."""
        cls = cls + self.attn.proj(context)
        return cls + self.mlp(self.norm2(cls))


class HTMLayer(nn.Module):
    """One exchange. Mode 0: encode, then fuse; 1: encode only; 2: fuse only; 3: fuse, then encode.

    `share` says which units serve both streams (`encoder` is the paper's, `none` the published code's).
    It belongs to mode 0; the other modes share the encoder alone, as published.
    """

    def __init__(self, width: int, *, share: Share = "encoder", mode: int = 0) -> None:
        super().__init__()
        if width % HEADS:
            raise ValueError(f"HTM: width must be a multiple of its {HEADS} heads, got {width}")
        if mode not in (0, 1, 2, 3):
            raise ValueError(f"HTM: mode must be 0, 1, 2 or 3, got {mode}")
        self.mode = mode
        if mode != 0:
            share = "encoder"
        num_encoders = 0 if mode == 2 else 1 if share in ("encoder", "all") else 2
        num_fusions = 0 if mode == 1 else 1 if share in ("fusion", "all") else 2
        self.encoders = nn.ModuleList(SEU(width) for _ in range(num_encoders))
        self.fusions = nn.ModuleList(MFU(width) for _ in range(num_fusions))

    def forward(self, cls: Pair, tokens: Pair) -> Pair:
        """Return the new class tokens (B, C) of both streams, given theirs and the patch tokens (B, N, C)."""
        if self.mode in (2, 3):
            cls = self.fuse(cls, tokens)
        if self.mode == 2:
            return cls
        encoded_cnn, encoded_transformer = self.encode(cls, tokens)
        cls = encoded_cnn[:, 0], encoded_transformer[:, 0]
        if self.mode == 0:
            cls = self.fuse(cls, (encoded_cnn[:, 1:], encoded_transformer[:, 1:]))
        return cls

    def encode(self, cls: Pair, tokens: Pair) -> Pair:
        """Let the tokens of each stream, class token first, attend among themselves: two (B, 1 + N, C)."""
        cnn, transformer = self.encoders[0], self.encoders[-1]
        x_cnn, x_transformer = (torch.cat([c[:, None], t], 1) for c, t in zip(cls, tokens))  # (B, 1 + N, C)
        attended = dual_self_attention(cnn.project(x_cnn), transformer.project(x_transformer))
        return cnn.finish(x_cnn, attended[0]), transformer.finish(x_transformer, attended[1])

    def fuse(self, cls: Pair, tokens: Pair) -> Pair:
        """Let each class token (B, C) attend over the other stream's patches (B, N, C)."""
        cnn, transformer = self.fusions[0], self.fusions[-1]
        context = dual_cross_attention(cnn.stream(cls[0], tokens[1]), transformer.stream(cls[1], tokens[0]))
        return cnn.finish(cls[0], context[0]), transformer.finish(cls[1], context[1])


class HTM(nn.Module):
    """Stack of exchange layers: each reads the same patch tokens, only the class tokens move on."""

    def __init__(self, width: int, layers: int, *, share: Share = "encoder", mode: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HTMLayer(width, share=share, mode=mode) for _ in range(layers))

    def forward(self, cls: Pair, tokens: Pair) -> Pair:
        """Pass the class tokens (B, C) of both streams through all layers."""
        for layer in self.layers:
            cls = layer(cls, tokens)
        return cls
