"""Where a loss that is not finite began: the first module in which a number overflowed is named."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fusionreid.engine.train import main as train
from fusionreid.engine.training.non_finite import watched
from tests.runs import arguments


class Exploding(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x / 0, 1


class First(nn.Module):
    def forward(self, values: tuple[torch.Tensor, int]) -> torch.Tensor:
        return values[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_module_and_the_reason_are_named(compiled: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Identity(), Exploding()), First(), nn.Linear(3, 2))
    if compiled:
        model[1].compile(backend="eager")
    with watched(model) as found:
        model(torch.ones(2, 3))
    assert found[0] == "1.1 (Exploding), from finite inputs and weights: 6 of 6 values"
    assert found[1].startswith("1 (Sequential), ")
    assert found[2] == "2 (First), by its input: 6 of 6 values"
    nn.init.constant_(model[0].weight, torch.nan)
    with watched(model) as found:
        model(torch.ones(2, 3))
    assert found[0] == "0 (Linear), by its weights: 6 of 6 values"
    with watched(nn.Linear(3, 3)) as found:
        model(torch.ones(2, 3))
    assert not found, "modules of another model"


def test_a_training_that_diverges_says_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = arguments(tmp_path / "data", tmp_path / "out", SOLVER__BASE_LR=1e30, SOLVER__WARMUP_ITERS=0)
    assert train(options) == 5
    origin = json.loads((tmp_path / "out" / "non_finite.json").read_text())["began_in"]
    assert "values" in origin
    assert f"It began in {origin}." in capfd.readouterr().err
