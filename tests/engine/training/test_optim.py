"""The published groups and schedule, entry by entry, and the guarded update on local shards."""

import copy
import json

import pytest
import torch
from torch import nn

from fusionreid.engine.config import SolverConfig
from fusionreid.engine.distributed import parallel
from fusionreid.engine.training.optim import Optimizer, group_of, learning_rate
from tests.numerics import FIXTURES

CPU = torch.device("cpu")
SCHEDULES = json.loads((FIXTURES / "modules/schedule.json").read_text())
GROUPS = json.loads((FIXTURES / "modules/param_groups.json").read_text())


@pytest.fixture(scope="module")
def ranks() -> parallel.Ranks:
    return parallel.start("cpu")


def solver(**keys: object) -> SolverConfig:
    return SolverConfig(**{"PRECISION": "fp32", "BASE_LR": 0.1, "WARMUP_ITERS": 0, **keys})


def small_model() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 4))
    model[2].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_is_the_published_one(name: str) -> None:
    case = SCHEDULES[name]
    keys = solver(BASE_LR=case["base_lr"], MAX_EPOCHS=case["max_epochs"], WARMUP_ITERS=case["warmup"])
    for kind, base in (("weight", case["base_lr"]), ("bias", case["base_lr"] * case["bias_lr_factor"])):
        ours = [learning_rate(epoch, base, keys) for epoch in range(len(case[kind]))]
        assert ours == pytest.approx(case[kind], rel=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_the_published_ones(name: str) -> None:
    keys = SolverConfig(LARGE_FC_LR=name.endswith("large_fc"))
    ours = [[entry, *group_of(entry, keys)] for entry, _, _ in GROUPS[name]["groups"]]
    assert ours == GROUPS[name]["groups"]


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_new_rate_is_written_into_the_old_tensor(ranks: parallel.Ranks, kind: str) -> None:
    keys = solver(OPTIMIZER_NAME=kind, MAX_EPOCHS=10, BIAS_LR_FACTOR=3.0)
    optimizer = Optimizer(parallel.shard(small_model(), ranks), keys, CPU)
    tensors = [group["lr"] for group in optimizer.torch.param_groups]
    optimizer.set_epoch(4)
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.torch.param_groups, tensors))
    expected = [learning_rate(4, base, keys) for base in (0.1, 0.1 * 3.0)]
    assert sorted(tensor.item() for tensor in tensors) == expected
    assert optimizer.rate == learning_rate(4, 0.1, keys)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_sharded_update_equals_plain_torch(ranks: parallel.Ranks, kind: str) -> None:
    keys = solver(OPTIMIZER_NAME=kind, WEIGHT_DECAY=1e-2, WEIGHT_DECAY_BIAS=1e-2, BIAS_LR_FACTOR=1)
    model, plain = small_model(), small_model()
    ours = Optimizer(parallel.shard(model, ranks), keys, CPU)
    extra = {"momentum": keys.MOMENTUM} if kind == "SGD" else {}
    trained = [p for p in plain.parameters() if p.requires_grad]
    theirs = getattr(torch.optim, kind)(trained, 0.1, weight_decay=1e-2, **extra)
    for step in range(4):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step))
        ours.backward(model(x).square().mean())
        ours.step(torch.zeros(()))
        plain(x).square().mean().backward()
        theirs.step()
        theirs.zero_grad()
        assert all(t.grad is None for t in (*model.parameters(), *ours.shards.values()))  # nor is their memory held
    for (name, a), b in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(parallel.full_tensor(a), b.detach(), rtol=1e-6, atol=1e-7, msg=name)
    assert len(ours.torch.param_groups) == 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("factor", [torch.nan, 1.0])  # of the loss: once one was not finite, no later one counts
def test_a_non_finite_step_changes_nothing(ranks: parallel.Ranks, precision: str, factor: float) -> None:
    model = parallel.shard(small_model(), ranks)
    optimizer = Optimizer(model, solver(PRECISION=precision), CPU)
    for step, bad in enumerate((False, True, True, False)):
        before = [parallel.full_tensor(p).clone() for p in model.parameters()]
        loss = model(torch.randn(7, 6)).square().mean()
        optimizer.backward(loss * factor if bad else loss)
        optimizer.step(torch.tensor(bad))
        same = [torch.equal(a, parallel.full_tensor(b)) for a, b in zip(before, model.parameters())]
        assert all(same) if bad else not all(same)
        assert optimizer.skipped.item() == (step if bad else 0)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_state_continues_bit_for_bit(ranks: parallel.Ranks, kind: str) -> None:
    model = parallel.shard(small_model(), ranks)
    first = Optimizer(model, solver(OPTIMIZER_NAME=kind), CPU)

    def advance(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
        optimizer.backward(model(torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))).square().mean())
        optimizer.step(torch.zeros(()))

    advance(model, first, 0)
    saved = {k: v.clone() for k, v in first.state().items()}
    weights = copy.deepcopy({k: parallel.full_tensor(v) for k, v in model.state_dict().items()})
    advance(model, first, 1)

    other = small_model()
    other.load_state_dict(weights)
    second = Optimizer(parallel.shard(other, ranks), solver(OPTIMIZER_NAME=kind), CPU)
    second.load(saved)
    advance(other, second, 1)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(parallel.full_tensor(a), parallel.full_tensor(b))


def test_clipping_bounds_the_gradient(ranks: parallel.Ranks) -> None:
    model = parallel.shard(small_model(), ranks)
    optimizer = Optimizer(model, solver(MAX_GRAD_NORM=1e-3, MOMENTUM=0.0, WEIGHT_DECAY=0.0, WEIGHT_DECAY_BIAS=0.0), CPU)
    before = torch.cat([parallel.full_tensor(p).flatten() for p in model.parameters()])
    optimizer.backward(1e3 * model(torch.randn(7, 6)).square().mean())
    optimizer.step(torch.zeros(()))
    moved = torch.cat([parallel.full_tensor(p).flatten() for p in model.parameters()]) - before
    assert moved.norm().item() <= 0.2 * 1e-3 * 1.001


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_restored_state_lies_in_memory_as_its_weight_does(ranks: parallel.Ranks, kind: str) -> None:
    """A checkpoint's tensors are contiguous; a fused step reads the weight and its state in the same order."""
    conv = nn.Conv2d(4, 4, 3, bias=False).to(memory_format=torch.channels_last)
    optimizer = Optimizer(parallel.shard(conv, ranks), solver(OPTIMIZER_NAME=kind), CPU)
    names = ["momentum_buffer"] if kind == "SGD" else ["exp_avg", "exp_avg_sq"]
    saved = {f"weight/{name}": torch.rand(4, 4, 3, 3) for name in names}
    optimizer.load(saved | ({"weight/step": torch.tensor(3.0)} if kind == "AdamW" else {}))
    for entry, value in saved.items():
        own = optimizer.state()[entry]
        assert own.stride() == optimizer.shards["weight"].stride()
        assert torch.equal(own, value)
