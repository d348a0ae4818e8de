"""Training loss: label-smoothed identity loss and batch-hard triplet loss of every head; center loss on one."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusionreid.kernels import batch_hard_triplet, smoothed_cross_entropy

if TYPE_CHECKING:
    from fusionreid.model import Outputs

HEADS = ("resnet", "transformer", "res_lru", "former_lru", "htm_res", "htm_former")


def head_names(cnn: bool, transformer: bool) -> tuple[str, ...]:
    """Return the names of the heads of a model with these branches, in the order of its outputs."""
    return HEADS if cnn and transformer else HEADS[:1] if cnn else HEADS[1:2]


class LossParts(NamedTuple):
    """Total loss and what it is made of."""

    total: Tensor  # (), fp32 at least
    identity: Tensor  # (heads,), not weighted
    triplet: Tensor  # (heads,), not weighted
    center: Tensor  # (), not weighted, 0 without a center loss


class CosineMargin(NamedTuple):
    """Margin on cosines: makes logits in which an image's own person is harder, cos - m (cosface) or cos(angle + m).

    The latter is arcface; past the angle pi - m, where that cosine would rise again, it goes on as cos - m sin m.
    Source: Wang et al., CosFace, arXiv:1801.09414; Deng et al., ArcFace, arXiv:1801.07698.
    """

    kind: str  # cosface or arcface
    margin: float
    scale: float

    def __call__(self, cosines: Tensor, persons: Tensor) -> Tensor:
        """Return the logits (B, Y) of cosines (B, Y), in fp32 at least; persons are labels (B,)."""
        cosines = cosines.to(torch.promote_types(cosines.dtype, torch.float32))
        own = cosines.gather(1, persons[:, None])
        if self.kind == "cosface":
            harder = own - self.margin
        else:
            sine = (1 - own.square()).clamp_min(1e-6).sqrt()  # its slope is infinite at 0
            turned = own * math.cos(self.margin) - sine * math.sin(self.margin)
            harder = torch.where(own > -math.cos(self.margin), turned, own - self.margin * math.sin(self.margin))
        return self.scale * cosines.scatter(1, persons[:, None], harder)


class CenterLoss(nn.Module):
    """Mean squared distance of a feature to the learnt center of its person. Source: Wen et al., ECCV 2016."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.empty(num_classes, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the centers as published: from a normal distribution."""
        nn.init.normal_(self.centers)

    def forward(self, feature_BD: Tensor, persons_B: Tensor) -> Tensor:
        """Return the mean over the batch, a scalar."""
        difference_BD = feature_BD - self.centers[persons_B]  # in fp32 at least, as the centers are
        return difference_BD.square().sum(1).clamp(1e-12, 1e12).mean()


def unit(feature: Tensor) -> Tensor:
    """Features (B, D) at unit length, in fp32 at least."""
    return F.normalize(feature.to(torch.promote_types(feature.dtype, torch.float32)))


def reid_loss(
    outputs: "Outputs",
    persons: Tensor,
    *,
    unit_features: bool = False,
    margin: float | None = None,
    label_smoothing: float = 0.1,
    cosine_margin: CosineMargin | None = None,
    id_weight: float = 1.0,
    triplet_weight: float = 1.0,
    center_loss: CenterLoss | None = None,
    center_weight: float = 0.0005,
    product_dtype: torch.dtype | None = None,
) -> LossParts:
    """Sum identity and triplet loss over the heads; persons are labels (B,). `margin=None` is the soft margin.

    Triplets are of features as they are, as published, or by `unit_features` at unit length, as they are retrieved.
    `cosine_margin` is for outputs whose logits are cosines; `product_dtype` is that of `batch_hard_triplet`.
    The published code's other rule, for a head that is itself a list, is left out: no model has such a head.
    """
    logits = outputs.logits if cosine_margin is None else [cosine_margin(z, persons) for z in outputs.logits]
    identity = smoothed_cross_entropy(logits, persons, label_smoothing)
    compared = [unit(feature) for feature in outputs.features] if unit_features else outputs.features
    triplet = batch_hard_triplet(compared, persons, margin=margin, product_dtype=product_dtype).losses
    total = torch.add(id_weight * identity, triplet, alpha=triplet_weight).sum()
    if center_loss is None:
        return LossParts(total, identity, triplet, identity.new_zeros(()))
    center = center_loss(outputs.features[0], persons)
    return LossParts(total + center_weight * center, identity, triplet, center)
