"""GeM, the generalised mean over the cells of a feature map:  y = (mean(max(x, eps)^p))^(1/p), p learnt.

Source: Radenovic et al., Fine-tuning CNN Image Retrieval with No Human Annotation, arXiv:1711.02512.
"""

import torch
from torch import Tensor, nn


class GeM(nn.Module):
    """Generalised mean pooling, in float32 at least, because x^p underflows in half precision."""

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.initial_p, self.eps = p, eps
        self.p = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start p where it was given."""
        nn.init.constant_(self.p, self.initial_p)

    def forward(self, x: Tensor) -> Tensor:
        """Pool a map (B, C, H, W) to a vector (B, C)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.clamp(min=self.eps).pow(self.p).mean((2, 3)).pow(1 / self.p)
