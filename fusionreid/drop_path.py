"""Drop path whose draws are a function of (seed, step, layer, image): the same on any number of ranks, in any chunks.

A branch of image i in layer l is kept where a Philox word of counter (i, l, step) lies below the rate of keeping.
Source: Huang et al., Deep Networks with Stochastic Depth, arXiv:1603.09382. B images, L drop paths of a model.
"""

import timm.layers
import torch
from torch import Tensor, nn

from fusionreid.kernels.philox import DROP_PATH, philox, uniform


class DropPath(timm.layers.DropPath):
    """Drops the branch of an image in training; without factors from outside it draws from torch's generator."""

    factor: Tensor | None = None  # (B,), 0 or 1 / (1 - rate): a tensor, since a number would compile anew per layer

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.factor is None:
            return super().forward(x)
        return x * self.factor.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def take_over(model: nn.Module) -> None:
    """Put ours in the place of every drop path of timm."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is timm.layers.DropPath:
                setattr(module, name, DropPath(child.drop_prob))


class Draws:
    """The factors of all drop paths of a model, drawn at once for a step; `images` (B,): places in the batch."""

    def __init__(self, model: nn.Module, seed: int, images: Tensor) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, DropPath)]
        self.key, self.images = (seed, 0), images
        self.layer = torch.arange(len(self.layers), device=images.device)[:, None]
        rates = torch.tensor([layer.drop_prob for layer in self.layers], dtype=torch.float64)
        self.keep_rate = (1 - rates).to(images.device, torch.float32)[:, None]
        self.factors = torch.ones(len(self.layers), len(images), device=images.device)

    def draw(self, step: Tensor) -> None:
        """Draw for a step (0-d int64 on the device, which is not waited for), in place."""
        if self.layers:
            bits = philox(self.key, (self.images, self.layer, step, DROP_PATH))[0]
            torch.div(uniform(bits) < self.keep_rate, self.keep_rate, out=self.factors)

    def show(self, images: slice) -> None:
        """The next forward is of these images of the batch."""
        for layer, factor in zip(self.layers, self.factors[:, images]):
            layer.factor = factor
