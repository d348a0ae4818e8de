"""PARALLEL.COMPILE and CHECKPOINT: every part is one graph without a break, and the steps are those of eager."""

from collections.abc import Iterator
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionreid import build_model
from fusionreid.config import ModelConfig
from fusionreid.engine.config import ParallelConfig
from fusionreid.engine.distributed import parallel
from fusionreid.engine.distributed.compile import blocks
from fusionreid.engine.distributed.parallel import DeviceError
from tests.numerics import assert_close
from tests.ranks import MODEL, config, train

TRANSFORMER = {"MODEL": {"RES_USE": False}}
compile_module = nn.Module.compile


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's front end and autograd, without its code generation, which takes minutes for all parts."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(compile_module, backend="aot_eager"))


@pytest.fixture(scope="module")
def eager() -> dict[str, Tensor]:
    return train(config(), torch.float64)


@pytest.mark.parametrize(
    "keys",
    [{"CHECKPOINT": True}, {"COMPILE": "blocks"}, {"COMPILE": "blocks", "CHECKPOINT": True}, {"COMPILE": "whole"}],
    ids=str,
)
@pytest.mark.usefixtures("traced")
def test_traced_steps_are_eager_ones(eager: dict[str, Tensor], keys: dict[str, Any]) -> None:
    ours = train(config(PARALLEL=keys), torch.float64)
    for name, expected in eager.items():
        error = (ours[name] - expected).abs().max().item()
        assert error <= 1e-9 * max(expected.abs().max().item(), 1e-2), f"{name}: {error:.2e}"


def test_compiled_transformer_follows_the_eager_loss_curve() -> None:
    eager, compiled = (train(config(**TRANSFORMER, PARALLEL={"COMPILE": c}), torch.float32) for c in ("off", "blocks"))
    gold = train(config(**TRANSFORMER), torch.float64)["losses"]
    assert_close("compiled", compiled["losses"], gold, 1e-5)
    assert_close("eager", eager["losses"], gold, 1e-5)


def model() -> nn.Module:
    return build_model(ModelConfig(**{**MODEL, "STRIDE_SIZE": (16, 16)}), (32, 16), 4, 2)


def compiled_parts(whole: nn.Module) -> set[str]:
    return {type(part).__name__ for part in whole.modules() if part._compiled_call_impl is not None}


def test_auto_compiles_nothing_on_a_cpu_and_blocks_is_all_that_is_heavy() -> None:
    ranks = parallel.start("cpu")
    assert compiled_parts(parallel.shard(model(), ranks, ParallelConfig())) == set()
    found = compiled_parts(parallel.shard(model(), ranks, ParallelConfig(COMPILE="blocks")))
    assert {"Block", "HTMLayer", "LRU", "GeM"} <= found
    assert compiled_parts(parallel.shard(model(), ranks, ParallelConfig(COMPILE="whole"))) == {"FusionReID"}


def test_blocks_are_the_outermost_ones() -> None:
    assert [type(block).__name__ for block in blocks(model())] == ["Block"] * 6 + ["HTMLayer"]


def test_processes_that_do_not_divide_are_named() -> None:
    with pytest.raises(DeviceError, match="divide the 1 processes, got 3"):
        parallel.shard(model(), parallel.start("cpu"), ParallelConfig(SHARD=3))
