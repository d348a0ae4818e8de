"""The gradient norm of the log: of the whole gradient, before clipping, without the loss scale, of real steps alone."""

import pytest
import torch
from torch import nn

from fusionreid.engine.config import SolverConfig
from fusionreid.engine.distributed import parallel
from fusionreid.engine.training.optim import Optimizer

CPU = torch.device("cpu")


def pair(**keys: object) -> tuple[nn.Module, Optimizer]:
    ranks = parallel.start("cpu")
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    return parallel.shard(model, ranks), Optimizer(model, SolverConfig(**keys), CPU)


def step(model: nn.Module, optimizer: Optimizer, seed: int, factor: float = 1.0) -> torch.Tensor:
    """One step; the norm of its gradient, computed plainly."""
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))
    loss = factor * model(x).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    optimizer.backward(loss)
    optimizer.step((~loss.isfinite()).to(torch.float32))
    return torch.cat([parallel.local_shard(g).flatten().double() for g in gradients]).norm()


@pytest.mark.parametrize("keys", [{}, {"PRECISION": "fp16"}, {"MAX_GRAD_NORM": 1e-3},
                                  {"PRECISION": "fp16", "MAX_GRAD_NORM": 1e-3}])  # fmt: skip
def test_it_is_the_root_mean_square_over_the_steps(keys: dict[str, object]) -> None:
    model, optimizer = pair(**{"PRECISION": "fp32", **keys})
    for seeds in ([1], [2, 3, 4]):
        norms = torch.stack([step(model, optimizer, seed) for seed in seeds])
        torch.testing.assert_close(optimizer.take_gradient_norm(), norms.square().mean().sqrt(), rtol=1e-5, atol=0)
    assert optimizer.take_gradient_norm().isnan()  # of no step


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_steps_that_were_skipped_do_not_count(precision: str) -> None:
    model, optimizer = pair(PRECISION=precision)
    first = step(model, optimizer, 1)
    step(model, optimizer, 2, factor=torch.inf)
    torch.testing.assert_close(optimizer.take_gradient_norm(), first, rtol=1e-5, atol=0)


def test_the_parts_of_a_tensor() -> None:
    ranks = parallel.start("cpu")
    model = parallel.shard(nn.Linear(4, 4), ranks)
    assert parallel.shards_of(model.weight) == ranks.world_size
    assert parallel.shards_of(torch.zeros(3)) == 1
