"""Drop path as a function of (seed, step, layer, image): the same on any number of ranks and for any split of a batch.

A branch of image i in layer l is kept where a Philox word of counter (i, l, step) lies below the rate of keeping.
Source: Huang et al., Deep Networks with Stochastic Depth, arXiv:1603.09382. B images, L drop paths of a model.
"""

import timm.layers
import torch
from torch import Tensor, nn

from fusionreid.kernels.philox import DROP_PATH, philox, uniform


class DropPath(timm.layers.DropPath):
    """Residual branch that is dropped per image in training; without given factors torch's generator decides."""

    factor: Tensor | None = None  # (B,), 0 or 1 / (1 - rate): a tensor, since a number would compile anew per layer

    def forward(self, x: Tensor) -> Tensor:
        """Scale each image of a branch (B, ...) by its factor; in evaluation, return it as it is."""
        if not self.training or self.factor is None:
            return super().forward(x)
        return x * self.factor.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def take_over(model: nn.Module) -> None:
    """Replace every drop path of timm in a model by ours."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is timm.layers.DropPath:
                setattr(module, name, DropPath(child.drop_prob))


class Draws:
    """Factors of all drop paths of a model, drawn at once for a step; `images` (B,) are places in the batch."""

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
        """Hand the factors of these images of the batch to the layers, for the next forward pass."""
        for layer, factor in zip(self.layers, self.factors[:, images]):
            layer.factor = factor
