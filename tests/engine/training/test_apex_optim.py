"""NVIDIA apex behind the protocol of torch's fused optimisers; without a GPU a stand-in with its interface."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionreid.engine.config import SolverConfig
from fusionreid.engine.distributed import parallel
from fusionreid.engine.training import apex_optim
from fusionreid.engine.training.apex_optim import ApexError
from fusionreid.engine.training.optim import Optimizer
from tests.engine.training.test_optim import solver

KINDS = ["SGD", "Adam", "AdamW"]


class FusedSGD(torch.optim.Optimizer):
    """As far as apex's differs: a rate that is a number, and a flag in an int tensor at which its kernels look."""

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    def step(self) -> None:
        for group in self.param_groups:
            assert not isinstance(group["lr"], Tensor) or group["lr"].device.type == "cpu"
            for p in (p for p in group["params"] if p.grad is not None and not self._dummy_overflow_buf.item()):
                momentum = self.state[p]["momentum_buffer"]
                momentum.mul_(group["momentum"]).add_(p.grad + group["weight_decay"] * p)
                p.sub_(float(group["lr"]) * momentum)


class FusedAdam(torch.optim.Optimizer):
    """Likewise; the flag and a scale come from a loss scaler, the count of steps is the group's and is read first."""

    def __init__(self, params: Any, lr: float, adam_w_mode: bool, capturable: bool) -> None:
        assert capturable
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
        self._dummy_overflow_buf, self.decoupled = torch.zeros(1, dtype=torch.int32), adam_w_mode

    def step(self, grad_scaler: Any) -> None:
        for group in self.param_groups:
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            (first, second), count = group["betas"], group["step"].double()
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[torch.device("cpu")])
            inverse = grad_scaler._get_scale_async().double().reciprocal().float()
            for p in (p for p in group["params"] if p.grad is not None and self._dummy_overflow_buf.item() != 1):
                decay, state = group["weight_decay"] * p, self.state[p]
                gradient = p.grad * inverse + (0 if self.decoupled else decay)
                mean = state["exp_avg"].lerp_(gradient, 1 - first) / (1 - first**count)
                square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - second) / (1 - second**count)
                update = mean / (square.sqrt() + group["eps"]) + (decay if self.decoupled else 0)
                p.sub_(group["lr"] * update)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex_optim, "load", lambda _: SimpleNamespace(FusedSGD=FusedSGD, FusedAdam=FusedAdam))


def model_of(device: torch.device) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 4)).to(device)


def weights_after(keys: SolverConfig, device: torch.device, steps: Callable[[Optimizer, nn.Module], None]) -> Tensor:
    model = parallel.shard(model_of(device), parallel.start(device.type))
    optimizer = Optimizer(model, keys, device)
    optimizer.set_epoch(4)
    steps(optimizer, model)
    return torch.cat([parallel.full_tensor(p).flatten() for p in model.parameters()])


def train(optimizer: Optimizer, model: nn.Module, numbers: range = range(5)) -> None:
    """Step 1 has a loss that is not finite, step 3 is forbidden."""
    device = next(model.parameters()).device
    for number in numbers:
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(number)).to(device)
        optimizer.backward(model(x).square().mean() * (torch.nan if number == 1 else 1.0))
        optimizer.step(torch.tensor(number in (1, 3), device=device))


def check(keys: dict[str, object], device: torch.device, tolerance: float) -> None:
    ours, theirs = (weights_after(solver(OPTIMIZER_IMPL=impl, MAX_EPOCHS=9, WEIGHT_DECAY=1e-2, **keys), device, train)
                    for impl in ("apex", "torch"))  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stand_in_takes_the_same_steps_and_leaves_out_the_same(kind: str, precision: str, clip: float) -> None:
    check({"OPTIMIZER_NAME": kind, "PRECISION": precision, "MAX_GRAD_NORM": clip}, torch.device("cpu"), 1e-5)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("kind", KINDS)
def test_a_stand_in_goes_on_from_its_saved_state(kind: str) -> None:
    keys, saved = solver(OPTIMIZER_IMPL="apex", OPTIMIZER_NAME=kind), {}

    def interrupted(optimizer: Optimizer, model: nn.Module) -> None:
        train(optimizer, model, range(2))
        saved.update({entry: t.clone() for entry, t in optimizer.state().items()})
        again = Optimizer(model, keys, torch.device("cpu"))
        again.set_epoch(4)
        again.load(saved)
        train(again, model, range(2, 5))

    whole, parts = (weights_after(keys, torch.device("cpu"), steps) for steps in (train, interrupted))
    assert torch.equal(whole, parts)
    assert all(t.ndim == 0 and t == 1 for entry, t in saved.items() if entry.endswith("/step"))


@pytest.mark.needs_gpu("NVIDIA apex has no CPU kernels")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_apex_takes_the_steps_of_torch(kind: str, precision: str) -> None:
    try:
        apex_optim.load("cuda")
    except ApexError as error:
        pytest.skip(f"NVIDIA apex is not installed: {error}")
    # Its betas are single: 1 - 0.999 is off by 1e-5.
    check({"OPTIMIZER_NAME": kind, "PRECISION": precision}, torch.device("cuda", 0), 1e-4)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ApexError, match=r"SOLVER.OPTIMIZER_IMPL apex computes on a GPU only, MODEL.DEVICE is cpu"):
        Optimizer(model_of(torch.device("cpu")), solver(OPTIMIZER_IMPL="apex"), torch.device("cpu"))
    namesake = SimpleNamespace(reify=None)  # the other project of that name
    for found in (None, namesake):
        monkeypatch.setitem(sys.modules, "amp_C", namesake)
        monkeypatch.setitem(sys.modules, "apex.optimizers", found)
        with pytest.raises(ApexError, match=r"needs NVIDIA apex .* build it from github.com/NVIDIA/apex") as caught:
            apex_optim.load("cuda")
        assert caught.value.exit_code == 2
