"""Head: the batch-norm neck and the identity classifier of one feature vector.

Source: Luo et al., Bag of Tricks for Deep Person Re-identification, arXiv:1903.07071.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """Batch-norm neck and classifier: the triplet loss sees the input, the classifier the normalised output.

    The neck's bias is frozen at 0. With `neck=False` nothing is normalised. With `cosines` the logits are cosines.
    """

    def __init__(self, width: int, num_classes: int, *, neck: bool = True, cosines: bool = False) -> None:
        super().__init__()
        self.cosines = cosines
        self.norm: nn.Module = nn.Identity()
        if neck:
            self.norm = nn.BatchNorm1d(width)
            self.norm.bias.requires_grad_(False)
        self.classifier = nn.Linear(width, num_classes, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the classifier as published."""
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised feature (B, D) and the logits (B, Y) of a feature (B, D)."""
        normed = self.norm(feature)
        if self.cosines:
            return normed, F.linear(F.normalize(normed), F.normalize(self.classifier.weight))
        return normed, self.classifier(normed)  # (B, D), (B, Y)
