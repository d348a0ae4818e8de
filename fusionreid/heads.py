"""A head: the batch-norm neck and the identity classifier of one feature vector.

Source: Luo et al., Bag of Tricks for Deep Person Re-identification, arXiv:1903.07071.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """The triplet loss sees the input, the classifier the normalised output; the neck's bias is frozen at 0.

    With `neck=False` nothing is normalised. With `cosines` the logits are cosines between -1 and 1.
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
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(feature)
        if self.cosines:
            return normed, F.linear(F.normalize(normed), F.normalize(self.classifier.weight))
        return normed, self.classifier(normed)  # (B, D), (B, Y)
