"""FusionReID: a CNN and a Transformer, fused by heterogenous transmission, six heads. Built from the MODEL section.

Source: Wang et al., Unity is Strength, arXiv:2412.17239. B images, C channels, N tokens, D width, Y identities.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusionreid.backbones.resnet import build_cnn
from fusionreid.backbones.t2t import SIZES as T2T_SIZES
from fusionreid.backbones.t2t import build_t2t
from fusionreid.backbones.vit import ViT, build_vit
from fusionreid.config import ModelConfig
from fusionreid.heads import Head
from fusionreid.htm import HTM, Share
from fusionreid.pooling import GeM
from fusionreid.refinement import LRU


class Outputs(NamedTuple):
    """Outputs of all heads, in the order resnet, transformer, resnet LRU, former LRU, HTM resnet, HTM former.

    The triplet loss reads `features` (B, D), the identity loss `logits` (B, Y). A single branch has one head.
    """

    features: tuple[Tensor, ...]
    normed: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]

    def embedding(self, neck: str = "before", part: int = 0) -> Tensor:
        """Return the test vector, `before` or `after` the neck: part 0 is all heads side by side, 1, 2, ... one."""
        if neck not in ("before", "after"):
            raise ValueError(f"Outputs.embedding: neck must be 'before' or 'after', got {neck!r}")
        parts = self.features if neck == "before" else self.normed
        if not 0 <= part <= len(parts):
            raise ValueError(f"Outputs.embedding: part must be 0 (all) or 1 to {len(parts)} (one head), got {part}")
        return parts[part - 1] if part else torch.cat(parts, 1)


class FusionReID(nn.Module):
    """CNN and Transformer with their fusion, or one branch alone: the other is None, `layers` has no effect.

    `cnn`: images -> (B, C, h, w), with `.width`; `transformer`: images, cameras -> (B, 1 + N, C), with `.width` and
    `.grid`. Each refinement unit is as wide as its branch, so T2T-ViT-24 and DeiT-S fuse too; the published code
    builds it for 768 channels there and cannot run. `neck` False takes the batch norm from the CNN's head alone;
    `cosines` makes the logits of all heads cosines.
    """

    def __init__(
        self,
        cnn: nn.Module | None,
        transformer: nn.Module | None,
        *,
        num_classes: int,
        width: int = 768,
        layers: int = 2,
        share: Share = "encoder",
        mode: int = 0,
        neck: bool = True,
        cosines: bool = False,
    ) -> None:
        super().__init__()
        if cnn is None and transformer is None:
            raise ValueError("FusionReID: needs a CNN, a Transformer or both, got neither")
        self.cnn, self.transformer = cnn, transformer
        self.heads = nn.ModuleList()
        if cnn is not None:
            self.cnn_pool = GeM()
            self.heads.append(Head(cnn.width, num_classes, neck=neck, cosines=cosines))
        if transformer is not None:
            self.heads.append(Head(transformer.width, num_classes, cosines=cosines))
        if cnn is not None and transformer is not None:
            self.cnn_lru = LRU(cnn.width, width)
            self.transformer_lru = LRU(transformer.width, width)
            self.cnn_lru_pool, self.transformer_lru_pool = GeM(), GeM()
            self.htm = HTM(width, layers, share=share, mode=mode)
            self.heads.extend(Head(width, num_classes, cosines=cosines) for _ in range(4))

    def reset_parameters(self) -> None:
        """Give every weight its start, after `to_empty` on a model that was built on the meta device."""
        for module in reversed(list(self.modules())):  # parts before the whole, which has the last word
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_parameters_in_paper(self) -> int:
        """Number of parameters as the paper's figure counts: no classifiers, class token, position or camera tables."""
        classifiers = sum(head.classifier.weight.numel() for head in self.heads)
        tables = self.transformer.parameters(recurse=False) if self.transformer is not None else ()
        return self.num_parameters - classifiers - sum(table.numel() for table in tables)

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Outputs:
        """Compute the outputs of normalised images (B, 3, H, W); cameras (B,) int64 where they have an embedding."""
        features: list[Tensor] = []
        if self.cnn is not None:
            feature_map = self.cnn(images)
            features.append(self.cnn_pool(feature_map))
        if self.transformer is not None:
            tokens = self.transformer(images, cameras)
            features.append(tokens[:, 0])
        if self.cnn is not None and self.transformer is not None:
            patches = tokens[:, 1:].transpose(1, 2).unflatten(2, self.transformer.grid)  # (B, C, h, w)
            features += self.fuse(feature_map, patches)
        normed, logits = zip(*(head(feature) for head, feature in zip(self.heads, features)))
        return Outputs(tuple(features), normed, logits)

    def fuse(self, cnn_map: Tensor, transformer_map: Tensor) -> tuple[Tensor, ...]:
        """Return the last four features (B, D), given the maps (B, C, h, w) of both branches, each in its own size."""
        cnn_map, transformer_map = self.cnn_lru(cnn_map), self.transformer_lru(transformer_map)  # (B, D, h, w)
        local = self.cnn_lru_pool(cnn_map), self.transformer_lru_pool(transformer_map)  # (B, D)
        tokens = cnn_map.flatten(2).transpose(1, 2), transformer_map.flatten(2).transpose(1, 2)  # (B, N, D)
        return *local, *self.htm(local, tokens)


def build_model(
    config: ModelConfig, image_size: tuple[int, int] = (256, 128), num_classes: int = 751, num_cameras: int = 6
) -> FusionReID:
    """Build the model of the MODEL section with random weights. `image_size` is (height, width) in pixels."""
    cnn = build_cnn(config.RES_MODE, config.RES_NAME, last_stride=config.LAST_STRIDE) if config.RES_USE else None
    return FusionReID(
        cnn,
        build_transformer(config, image_size, num_cameras) if config.TRANS_USE else None,
        num_classes=num_classes,
        width=config.MIX_DIM,
        layers=config.HTM_LAYER,
        share=config.HTM_SHARE,
        mode=config.HTM_MODE,
        neck=config.NECK == "bnneck",
        cosines=config.ID_LOSS_TYPE != "softmax",
    )


def build_transformer(config: ModelConfig, image_size: tuple[int, int], num_cameras: int) -> ViT:
    """Build the Transformer branch of the MODEL section with random weights."""
    options: dict[str, Any] = {
        "image_size": image_size,
        "drop_path": config.DROP_PATH,
        "dropout": config.DROP_OUT,
        "attention_dropout": config.ATT_DROP_RATE,
        "num_cameras": num_cameras if config.SIE_CAMERA else 0,
        "sie_weight": config.SIE_COE,
    }
    if config.TRANSFORMER_TYPE in T2T_SIZES:
        return build_t2t(config.TRANSFORMER_TYPE, **options)
    return build_vit(config.TRANSFORMER_TYPE, stride=config.STRIDE_SIZE, **options)
