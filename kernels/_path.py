"""Which path a tensor takes: Triton on a GPU, plain torch on a CPU."""

import os
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it once, so do we

# Tests and the build report send CPU tensors through the kernels: into Triton's interpreter, or its compiler alone.
triton_on_cpu = False


def use_triton(x: Tensor) -> bool:
    """float64 takes the plain path on every device: it is what the kernels are compared with."""
    return (x.is_cuda or triton_on_cpu) and x.dtype != torch.float64


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Triton compiles for the current device and launches on its stream, wherever the arguments are."""
    return torch.cuda.device_of(x)


def capability(device: torch.device | None = None) -> int:
    """Compute capability of a GPU, 90 for Hopper, by default of the one that kernels are compiled for.

    The interpreter behaves as a Hopper.
    """
    if INTERPRETED:
        return 90
    if device is not None and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    arch: int = triton.runtime.driver.active.get_current_target().arch
    return arch
