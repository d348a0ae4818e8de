"""SOLVER.PROFILE: so many steps in one file that viewers read, and the training goes on as if nothing had been."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from fusionreid.engine.monitoring.metrics import Metrics
from fusionreid.engine.monitoring.profiler import WARM_UP, Profiler


def run(folder: Path, steps: int, profiled: int, first: int = 1, enabled: bool = True) -> None:
    """Steps that each multiply once."""
    metrics = Metrics(folder, total_steps=steps, enabled=enabled, loggers={})
    profiler = Profiler(folder, profiled, metrics)
    matrix = torch.ones(8, 8)
    for number in range(first, first + steps):
        torch.mm(matrix, matrix)
        profiler.step(number)
    profiler.close(first + steps - 1)
    metrics.close()


def products(path: Path) -> int:
    with gzip.open(path, "rt") as file:
        return sum(event.get("name") == "aten::mm" for event in json.load(file)["traceEvents"])


@pytest.mark.parametrize(("steps", "profiled", "first", "name", "count"), [
    (WARM_UP + 9, 3, 1, "profile-11-13.json.gz", 3),
    (WARM_UP + 9, 1, 101, "profile-111-111.json.gz", 1),  # a resumed run
    (WARM_UP + 2, 50, 1, "profile-11-12.json.gz", 2),  # a run that ends before
])  # fmt: skip
def test_the_steps_asked_for_after_the_warm_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, profiled: int, first: int, name: str, count: int
) -> None:
    run(tmp_path, steps, profiled, first)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert products(tmp_path / name) == count
    assert capsys.readouterr().out.endswith(f"{tmp_path / name}\n")


@pytest.mark.parametrize("steps", [WARM_UP - 1, WARM_UP])
def test_a_run_that_ends_within_the_warm_up_says_so(tmp_path: Path, capsys, steps: int) -> None:
    run(tmp_path, steps, profiled=3)
    assert capsys.readouterr().out == f"no profile: the run ended within the {WARM_UP} steps of its warm-up\n"
    run(tmp_path, WARM_UP + 1, profiled=1)  # the profiler was given back
    assert products(tmp_path / "profile-11-11.json.gz") == 1


@pytest.mark.parametrize("options", [{"profiled": 0}, {"profiled": 3, "enabled": False}])
def test_nobody_asked_or_another_rank(tmp_path: Path, capsys, options: dict[str, int]) -> None:
    run(tmp_path, WARM_UP + 5, **options)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_profile_that_cannot_be_written_costs_itself_alone(tmp_path: Path, caplog) -> None:
    (tmp_path / "profile-11-12.json.gz").mkdir()
    run(tmp_path, WARM_UP + 5, profiled=2)
    assert "training continues" in caplog.text
