"""The training loss: label-smoothed identity loss and batch-hard triplet loss of every head; center loss on one."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kernels import batch_hard_triplet, smoothed_cross_entropy

if TYPE_CHECKING:
    from fusionreid.model import Outputs

HEADS = ("resnet", "transformer", "res_lru", "former_lru", "htm_res", "htm_former")


def head_names(cnn: bool, transformer: bool) -> tuple[str, ...]:
    """The heads of a model with these branches, in the order of its outputs."""
    return HEADS if cnn and transformer else HEADS[:1] if cnn else HEADS[1:2]


class LossParts(NamedTuple):
    total: Tensor  # (), fp32 at least
    identity: Tensor  # (heads,), not weighted
    triplet: Tensor  # (heads,), not weighted
    center: Tensor  # (), not weighted, 0 without a center loss


class CenterLoss(nn.Module):
    """Mean squared distance of a feature to the learnt center of its person. Source: Wen et al., ECCV 2016."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.empty(num_classes, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.centers)

    def forward(self, feature_BD: Tensor, persons_B: Tensor) -> Tensor:
        difference_BD = feature_BD - self.centers[persons_B]  # in fp32 at least, as the centers are
        return difference_BD.square().sum(1).clamp(1e-12, 1e12).mean()


def reid_loss(
    outputs: "Outputs",
    persons: Tensor,
    *,
    margin: float | None = None,
    label_smoothing: float = 0.1,
    id_weight: float = 1.0,
    triplet_weight: float = 1.0,
    center_loss: CenterLoss | None = None,
    center_weight: float = 0.0005,
    product_dtype: torch.dtype | None = None,
) -> LossParts:
    """Sum over the heads of identity and triplet loss; persons are labels (B,). `margin=None`: soft margin.

    `product_dtype` is that of `batch_hard_triplet`.
    The published code's other rule, for a head that is itself a list, is left out: no model has such a head.
    """
    identity = smoothed_cross_entropy(outputs.logits, persons, label_smoothing)
    triplet = batch_hard_triplet(outputs.features, persons, margin=margin, product_dtype=product_dtype).losses
    center = center_loss(outputs.features[0], persons) if center_loss is not None else identity.new_zeros(())
    total = id_weight * identity.sum() + triplet_weight * triplet.sum() + center_weight * center
    return LossParts(total, identity, triplet, center)
