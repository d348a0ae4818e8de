"""LRU, the local refinement unit: brings a branch's feature map to the common width before the fusion.

Source: FusionReID, arXiv:2412.17239; the published "depth-wise" convolution is 1 x 1, a scale and a shift per channel.
"""

import torch
from torch import Tensor, nn


class LRU(nn.Module):
    """Depth-wise and point-wise 1 x 1 convolution, each with batch norm and PReLU."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(in_width, in_width, 1, groups=in_width)
        self.bn1 = nn.BatchNorm2d(in_width)
        self.act1 = nn.PReLU()
        self.ptconv = nn.Conv2d(in_width, out_width, 1)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.act2 = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Refine a map (B, C, H, W) to (B, D, H, W)."""
        scale, shift = (t.to(x.dtype).view(-1, 1, 1) for t in (self.dwconv.weight, self.dwconv.bias))
        x = self.act1(self.bn1(torch.addcmul(shift, x, scale)))  # what the convolution means; it is slower
        return self.act2(self.bn2(self.ptconv(x)))
