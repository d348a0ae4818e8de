"""The Transformer branch: a ViT with overlapping patches and camera embedding, from any timm VisionTransformer or Eva.

Source: Dosovitskiy et al., arXiv:2010.11929; overlapping patches and SIE: He et al., TransReID, arXiv:2102.04378;
rotary positions: Simeoni et al., DINOv3, arXiv:2508.10104.
B images, N patches, C width.
"""

from typing import Any

import timm
import torch
from timm.layers import Attention, PatchEmbed
from timm.models import is_model_in_modules
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fusionreid.backbones import BackboneError
from fusionreid.blocks import SelfAttention
from fusionreid.drop_path import take_over


class ViT(nn.Module):
    """ViT with camera embedding; its tokens come after the last norm, class token first.

    SIE adds `sie_weight * sie_embed[camera]` to every token; camera -1 is an unknown camera and gets the mean row. With
    a single row there is nothing to tell apart, hence no table. `registers` tokens follow the class token inside and
    are left out of the result. The position table begins with rows for `positioned_prefix` of these tokens; None: there
    is no table. With `rope`, timm's rotary embedding of the grid, the blocks turn queries and keys.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: nn.Sequential | nn.ModuleList,
        norm: nn.Module,
        *,
        width: int,
        image_size: tuple[int, int],
        grid: tuple[int, int],
        num_cameras: int = 0,
        sie_weight: float = 3.0,
        dropout: float = 0.0,
        registers: int = 0,
        positioned_prefix: int | None = 1,
        norm_pre: nn.Module | None = None,
        rope: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.width, self.image_size, self.grid = width, tuple(image_size), grid
        self.num_cameras, self.sie_weight = num_cameras, sie_weight
        self.num_prefix, self.positioned_prefix = 1 + registers, positioned_prefix or 0
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.reg_token = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        places = None if positioned_prefix is None else positioned_prefix + grid[0] * grid[1]
        self.register_parameter("pos_embed", places and nn.Parameter(torch.empty(1, places, width)))
        self.sie_embed = nn.Parameter(torch.empty(num_cameras, 1, width)) if num_cameras > 1 else None
        self.drop = nn.Dropout(dropout)
        self.norm_pre = norm_pre or nn.Identity()
        self.rope = rope
        self.blocks = blocks
        self.norm = norm
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start every weight of the backbone as published; the bias of a convolution is 0, as CLIP has none."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, EvaBlock | EvaAttention) or (
                hasattr(module, "reset_parameters") and next(module.children(), None) is None
            ):
                module.reset_parameters()
        for table in (self.cls_token, self.reg_token, self.pos_embed, self.sie_embed):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """Return tokens (B, 1 + N, C) of images (B, 3, H, W); cameras (B,) where there is an embedding of them."""
        if images.shape[2:] != self.image_size:
            raise ValueError(f"ViT: built for images of {self.image_size}, got {tuple(images.shape[2:])}")
        prefix = self.cls_token if self.reg_token is None else torch.cat((self.cls_token, self.reg_token), 1)
        x = torch.cat((prefix.expand(images.shape[0], -1, -1), self.patch_embed(images)), 1)
        if self.pos_embed is not None:
            bare = self.num_prefix - self.positioned_prefix  # leading tokens that have no position
            x = x + (nn.functional.pad(self.pos_embed, (0, 0, bare, 0)) if bare else self.pos_embed)
        if self.sie_embed is not None:
            x = x + self.sie_weight * self.side_information(cameras)
        x = self.norm_pre(self.drop(x))
        rope = {} if self.rope is None else {"rope": self.rope.get_embed()}
        for block in self.blocks:
            x = block(x, **rope)
        x = self.norm(x)
        return x if self.num_prefix == 1 else torch.cat((x[:, :1], x[:, self.num_prefix :]), 1)

    def side_information(self, cameras: Tensor | None) -> Tensor:
        """Look up the embedding (B, 1, C) of each image's camera."""
        assert self.sie_embed is not None
        if cameras is None:
            raise ValueError(
                f"ViT: has an embedding of {self.num_cameras} cameras and needs the ids (B,); an unknown camera is -1"
            )
        return torch.cat((self.sie_embed, self.sie_embed.mean(0, keepdim=True)))[cameras]


class TimmAttention(SelfAttention):
    """Our attention in a timm block, which may hand over a mask; here there is none."""

    def forward(self, x: Tensor, *unused: None, **unused_by_name: object) -> Tensor:
        """Attend among the tokens (B, N, C) of each image."""
        return super().forward(x)


def from_timm(
    source: VisionTransformer | Eva,
    *,
    image_size: tuple[int, int],
    stride: tuple[int, int],
    scale: float | None = None,
    dropout: float = 0.0,
    **sie: Any,
) -> ViT:
    """Build a ViT of a timm model's parts, its patches now `stride` apart. `scale` is that of the attention.

    `sie` holds `num_cameras` and `sie_weight`.
    """
    if type(source) not in (VisionTransformer, Eva) or type(source.patch_embed) is not PatchEmbed:
        raise BackboneError(
            "ViT: TRANSFORMER_TYPE must be a plain VisionTransformer or Eva of timm (with patches from one "
            f"convolution), got {type(source).__name__}"
        )
    rope = getattr(source, "rope", None)
    same_in_all_blocks = rope is None or (hasattr(rope, "update_feat_shape") and not source.rope_mixed)
    if source.cls_token is None or (rope is None and source.pos_embed is None) or not same_in_all_blocks:
        raise BackboneError(
            "ViT: TRANSFORMER_TYPE must be a ViT with a class token and a position table or fixed rotary positions, "
            "this has not both"
        )
    embed = source.patch_embed
    embed.img_size, embed.flatten = None, True  # timm then takes any size, and answers (B, N, C)
    embed.proj.stride = tuple(stride)
    grid = tuple((size - patch) // step + 1 for size, patch, step in zip(image_size, embed.patch_size, stride))
    if min(grid) < 1:
        raise BackboneError(f"ViT: image_size {image_size} must hold a patch of {embed.patch_size}")
    if rope is not None:
        rope.update_feat_shape(grid)
    take_over(source.blocks)
    table = source.pos_embed is not None
    for block in source.blocks:
        if type(block) is Block:
            block.attn = _ours(block.attn, scale)
    return ViT(
        embed,
        source.blocks,
        source.fc_norm if isinstance(source.norm, nn.Identity) else source.norm,
        width=source.embed_dim,
        image_size=image_size,
        grid=grid,
        dropout=dropout,
        registers=source.num_prefix_tokens - 1,
        positioned_prefix=(0 if source.no_embed_class else source.num_prefix_tokens) if table else None,
        norm_pre=source.norm_pre,
        rope=rope,
        **sie,
    )


def _ours(attention: nn.Module, scale: float | None) -> nn.Module:
    """The same attention on our op; one with extras (query norms, a gate, ...) stays timm's."""
    extras = ("q_norm", "k_norm", "norm", "gate")
    plain = type(attention) is Attention and attention.proj.bias is not None
    if not plain or any(not isinstance(getattr(attention, e, None), nn.Identity | None) for e in extras):
        return attention
    with torch.device("meta"):
        ours = TimmAttention(
            attention.proj.in_features,
            attention.num_heads,
            qkv_bias=attention.qkv.bias is not None,
            scale=scale,
            dropout=attention.proj_drop.p,
            attention_dropout=attention.attn_drop.p,
        )
    ours.qkv, ours.proj = attention.qkv, attention.proj
    return ours


def build_vit(
    name: str,
    *,
    image_size: tuple[int, int],
    stride: tuple[int, int],
    drop_path: float = 0.0,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    **sie: Any,
) -> ViT:
    """Build a published TRANSFORMER_TYPE, any timm VisionTransformer, or an Eva such as the ViTs of DINOv3.

    Only the published `vit_small_patch16_224` is not timm's model of that name (that is `deit_small_patch16_224`): it
    is 768 wide, has 8 layers of 8 heads and scales its attention by 768^-0.5.
    """
    rates = {"drop_path_rate": drop_path, "proj_drop_rate": dropout, "attn_drop_rate": attention_dropout}
    name = name.removesuffix("_TransReID")
    small = name == "vit_small_patch16_224"
    if small:
        rates |= {"embed_dim": 768, "depth": 8, "num_heads": 8, "mlp_ratio": 3.0, "qkv_bias": False}
    own = {"dynamic_img_size": False} if is_model_in_modules(name, "eva") else {"weight_init": "skip"}
    try:
        source = timm.create_model(name, num_classes=0, **own, **rates)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise BackboneError(
            f"ViT: TRANSFORMER_TYPE must be a VisionTransformer of timm {timm.__version__}, got {name!r}: {error}"
        ) from error
    return from_timm(
        source, image_size=image_size, stride=stride, scale=768**-0.5 if small else None, dropout=dropout, **sie
    )
