"""SOLVER.OPTIMIZER_IMPL apex: NVIDIA apex's fused optimisers, which then take a step as torch's fused ones do.

A step of torch's reads `found_inf`, a flag on the device that makes it do nothing, and `grad_scale`, by which gradients
are divided. apex's kernels look at a flag of their own; writing ours into it keeps the host from waiting, and a
non-finite loss from the weights. Source: github.com/NVIDIA/apex, apex/optimizers/fused_sgd.py and fused_adam.py.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fusionreid.engine.config import SolverConfig
from fusionreid.errors import ReIDError


class ApexError(ReIDError, ValueError):
    """SOLVER.OPTIMIZER_IMPL is apex and NVIDIA apex cannot be used here."""


def load(device_type: str) -> Any:
    """The module apex.optimizers, with its kernels."""
    remedy = "set SOLVER.OPTIMIZER_IMPL torch"
    if device_type != "cuda":
        raise ApexError(f"SOLVER.OPTIMIZER_IMPL apex computes on a GPU only, MODEL.DEVICE is {device_type}: {remedy}")
    try:
        import_module("amp_C")
        module = import_module("apex.optimizers")
        _ = module.FusedSGD, module.FusedAdam
    except (ImportError, AttributeError) as error:
        raise ApexError(
            "SOLVER.OPTIMIZER_IMPL apex needs NVIDIA apex built with its CUDA extensions (the apex on PyPI is another "
            f"project): build it from github.com/NVIDIA/apex, or {remedy} ({error})"
        ) from error
    return module


def make(groups: Iterable[dict[str, Any]], solver: SolverConfig, device: torch.device) -> torch.optim.Optimizer:
    """Rates are 0-d tensors: of SGD on the host, since its kernels take a number, of Adam on the device, in float32."""
    module = load(device.type)
    if solver.OPTIMIZER_NAME == "SGD":

        class SGD(module.FusedSGD):  # type: ignore[name-defined]
            _step_supports_amp_scaling = True

            @torch.no_grad()
            def step(self, closure: None = None) -> None:
                _prepare(self)
                super().step()

        return SGD(groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM)

    class Adam(module.FusedAdam):  # type: ignore[name-defined]
        """Its groups count their steps; the count is also in every weight's state, to be saved with it."""

        _step_supports_amp_scaling = True

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            for group in self.param_groups:
                group["step"] = torch.zeros(1, dtype=torch.int32, device=device)
                for p in group["params"]:
                    moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": group["step"][0], **moments}

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            _prepare(self)
            super().step(grad_scaler=_Flag(self.found_inf))

    return Adam(groups, lr=solver.BASE_LR, adam_w_mode=solver.OPTIMIZER_NAME == "AdamW", capturable=True)


def _prepare(optimizer: Any) -> None:
    """The flag where apex looks at it, and gradients without their scale."""
    optimizer._dummy_overflow_buf.copy_(optimizer.found_inf)
    if optimizer.grad_scale is not None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, optimizer.grad_scale.reciprocal())


class _Flag:
    """As much of a loss scaler as FusedAdam asks: whether to do nothing, and a scale, of which none is left."""

    def __init__(self, found_inf: Tensor) -> None:
        self.found_inf = found_inf

    def _check_inf_per_device(self, _: Any) -> dict[torch.device, Tensor]:
        return {self.found_inf.device: self.found_inf}

    def _get_scale_async(self) -> Tensor:
        return torch.ones(1, device=self.found_inf.device)
