"""Parameter groups, optimiser and learning rate of the published recipe, applied to the local shards of a model."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fusionreid.engine.config import SolverConfig
from fusionreid.engine.distributed.parallel import all_reduce_max, all_reduce_mean, local_shard, shards_of
from fusionreid.engine.training import apex_optim

WARMUP_START = 0.01  # of the base rate, the same absolute start for every group
LOWEST = 0.002  # of the base rate, likewise


def learning_rate(epoch: int, group_base: float, solver: SolverConfig) -> float:
    """The rate of a group in an epoch counted from 1: linear warm-up, then the cosine read without an offset.

    As published, the last epoch runs at the lowest rate: the cosine's cycle is over.
    """
    start, lowest = WARMUP_START * solver.BASE_LR, LOWEST * solver.BASE_LR
    if epoch < solver.WARMUP_ITERS:
        return start + epoch * (group_base - start) / solver.WARMUP_ITERS
    if epoch >= solver.MAX_EPOCHS:
        return lowest
    return lowest + 0.5 * (group_base - lowest) * (1 + math.cos(math.pi * epoch / solver.MAX_EPOCHS))


def group_of(name: str, solver: SolverConfig) -> tuple[float, float]:
    """(base learning rate, weight decay) of a parameter, by its name."""
    rate, decay = solver.BASE_LR, solver.WEIGHT_DECAY
    if "bias" in name:
        rate, decay = solver.BASE_LR * solver.BIAS_LR_FACTOR, solver.WEIGHT_DECAY_BIAS
    if solver.LARGE_FC_LR and "classifier" in name:
        rate = solver.BASE_LR * 2
    return rate, decay


class LossScaler(torch.amp.GradScaler):
    """The loss scaler of fp16: an overflow on one rank makes every rank skip the step."""

    overflow: Tensor  # 0-d float32, 1 where the last gradient held an infinity or its step is forbidden
    forbidden: Tensor  # likewise, given before a step

    def _unscale_grads_(self, *args: Any) -> dict[torch.device, Tensor]:
        per_device = super()._unscale_grads_(*args)
        (self.overflow,) = (all_reduce_max(found_inf) for found_inf in per_device.values())
        self.overflow.copy_(torch.maximum(self.overflow, self.forbidden))
        return per_device


class Optimizer:
    """A fused torch optimiser over the local shards of all trainable parameters, merged by (rate, weight decay).

    A fused step takes a device flag that turns it into nothing, so that a non-finite loss never reaches the
    weights although the host has not seen it yet. The update is element by element: sharding does not alter it.
    """

    def __init__(self, model: nn.Module, solver: SolverConfig, device: torch.device) -> None:
        self.solver = solver
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shards = {name: local_shard(p.detach()) for name, p in self.parameters.items()}
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, shard in self.shards.items():
            groups.setdefault(group_of(name, solver), []).append(shard)
        self._parts = shards_of(next(iter(self.parameters.values())))
        self.rate = solver.BASE_LR  # of the weights
        on_host = device.type == "cpu" or (solver.OPTIMIZER_IMPL, solver.OPTIMIZER_NAME) == ("apex", "SGD")
        place = torch.device("cpu") if on_host else device
        exact = torch.float64 if on_host else torch.float32  # what a fused step reads there
        self.torch = _make(
            [{"params": shards, "lr": torch.tensor(rate, dtype=exact, device=place), "base": rate,
              "weight_decay": decay} for (rate, decay), shards in groups.items()], solver, device)  # fmt: skip
        if solver.OPTIMIZER_NAME == "SGD" and solver.MOMENTUM > 0:
            for shard in self.shards.values():  # torch leaves it uninitialised if the first step is skipped
                self.torch.state[shard]["momentum_buffer"] = torch.zeros_like(shard)
        self.scaler = LossScaler(device.type, enabled=solver.PRECISION == "fp16")
        self.skipped = torch.zeros((), device=device)  # steps skipped in a row
        self._squares = torch.zeros(2, dtype=torch.float64, device=device)  # of gradient norms; steps among them

    def set_epoch(self, epoch: int) -> None:
        """Set the learning rates of an epoch in place: a CUDA graph reads these tensors at every replay."""
        self.rate = learning_rate(epoch, self.solver.BASE_LR, self.solver)
        for group in self.torch.param_groups:
            group["lr"].fill_(learning_rate(epoch, group["base"], self.solver))

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss, scaled in fp16."""
        self.scaler.scale(loss).backward()

    @torch.no_grad()
    def step(self, non_finite: Tensor) -> None:
        """Update all weights, or none if `non_finite` (0-d, on the device) is set or the scaled gradient overflowed."""
        for name, p in self.parameters.items():
            self.shards[name].grad = None if p.grad is None else local_shard(p.grad)
        norm = self._norm_of_shards()
        flag = self.scaler.forbidden = non_finite.to(torch.float32)
        if self.solver.MAX_GRAD_NORM > 0:
            self.scaler.unscale_(self.torch)
            nn.utils.clip_grad_norm_(self.parameters.values(), self.solver.MAX_GRAD_NORM)
        if self.scaler.is_enabled():
            self.scaler.step(self.torch)
            flag = self.scaler.overflow
            self.scaler.update()
        else:
            self.torch.grad_scale, self.torch.found_inf = None, flag
            self.torch.step()
        self.skipped.add_(1).mul_(flag)
        self._squares += torch.where(flag > 0, 0, torch.stack([norm.square(), torch.ones_like(norm)]))
        for p in (*self.parameters.values(), *self.shards.values()):
            p.grad = None  # of both: else the next forward would run beside a gradient nobody reads

    @torch.no_grad()
    def take_gradient_norm(self) -> Tensor:
        """Root mean square of the gradient's norm before clipping (0-d) over the steps since this was last called.

        Skipped steps are left out; nan without any other. All ranks call it; the host waits for nothing.
        """
        squares, steps = all_reduce_mean(self._squares.clone())
        self._squares.zero_()
        return (squares * self._parts / steps).sqrt()

    def _norm_of_shards(self) -> Tensor:
        """Norm of this rank's part of the gradient, 0-d in double precision, without the loss scale."""
        norm = nn.utils.get_total_norm([s.grad for s in self.shards.values() if s.grad is not None]).double()
        return norm / self.scaler._scale if self.scaler.is_enabled() else norm

    def state(self) -> dict[str, Tensor]:
        """Every state tensor of the optimiser under "<parameter>/<what>", as local shards."""
        index = {id(shard): name for name, shard in self.shards.items()}
        state = {f"{index[id(shard)]}/{what}": value
                 for shard, values in self.torch.state.items()
                 for what, value in values.items() if isinstance(value, Tensor)}  # fmt: skip
        if self.scaler.is_enabled():
            state["scaler/scale"] = torch.tensor(self.scaler.get_scale())
            state["scaler/growth"] = torch.tensor(float(self.scaler._get_growth_tracker()))
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned, as local shards."""
        for entry, value in state.items():
            name, what = entry.rsplit("/", 1)
            if name == "scaler":
                continue
            shard = self.shards[name]
            own = self.torch.state[shard]
            if what not in own:  # laid out in memory as the weight is: a fused step reads both in that order
                own[what] = torch.empty_like(shard, dtype=value.dtype) if value.shape == shard.shape else value
            own[what].copy_(value)
        if self.scaler.is_enabled() and "scaler/scale" in state:
            scaler = self.scaler.state_dict()
            scaler["scale"], scaler["_growth_tracker"] = (
                state["scaler/scale"].item(), int(state["scaler/growth"].item()))  # fmt: skip
            self.scaler.load_state_dict(scaler)


def _make(groups: Iterable[dict], solver: SolverConfig, device: torch.device) -> torch.optim.Optimizer:
    if solver.OPTIMIZER_IMPL == "apex":
        return apex_optim.make(groups, solver, device)
    if solver.OPTIMIZER_NAME == "SGD":
        return torch.optim.SGD(groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, fused=True)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[solver.OPTIMIZER_NAME]
    warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # a fused step is the same
    return kind(groups, lr=solver.BASE_LR, fused=True, capturable=device.type == "cuda")
