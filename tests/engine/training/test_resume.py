"""A run goes on from what rank 0 finds, misses no evaluation, trains while it saves, and wants one shared folder."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.checkpoint import CheckpointError
from fusionreid.engine.evaluation import extract
from fusionreid.engine.train import main as train
from fusionreid.engine.training.state import StateCapture, restore
from fusionreid.engine.training.train_step import TrainStep
from tests import ROOT
from tests.engine.training.test_train_step import ALL, make
from tests.ranks import batch
from tests.runs import arguments


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def evaluations(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/mAP" in line]


@pytest.mark.parametrize("broken", [1, 3])
def test_an_evaluation_that_was_cut_short_is_made_up(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    unbroken, output, embed, calls = tmp_path / "unbroken", tmp_path / "broken", extract.feature_vectors, []
    assert train(arguments(root, unbroken, SOLVER__EVAL_PERIOD=1)) == 0

    def failing(*args: object, **options: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == broken:  # one batch an evaluation
            raise MemoryError
        return embed(*args, **options)

    monkeypatch.setattr(extract, "feature_vectors", failing)
    assert train(arguments(root, output, SOLVER__EVAL_PERIOD=1)) == 6
    assert len(evaluations(output)) == broken - 1
    assert train(arguments(root, output, SOLVER__EVAL_PERIOD=1)) == 0
    assert evaluations(output) == evaluations(unbroken)
    best, expected = (checkpoint.best(folder / "checkpoints") for folder in (output, unbroken))
    assert best is not None and expected is not None  # noqa: PT018
    assert (best.path.name, best.score) == (expected.path.name, expected.score)
    steps = checkpoint.checkpoints(output / "checkpoints")
    assert [path.name for path in steps] == [path.name for path in checkpoint.checkpoints(unbroken / "checkpoints")]


def test_training_goes_on_while_a_checkpoint_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, step, went_on, waits = checkpoint.save, TrainStep.__call__, threading.Event(), []

    def slow(folder: Path, number: int, tensors: dict, state: dict) -> Path:
        waits.append(went_on.wait(60) or state["epoch"] == 4)  # after the last epoch there is no step
        went_on.clear()
        return save(folder, number, tensors, state)

    def noted(self: TrainStep, *args: object) -> None:
        step(self, *args)
        if threading.active_count() > 1:
            went_on.set()

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(TrainStep, "__call__", noted)
    monkeypatch.setattr("fusionreid.engine.training.trainer.evaluate", lambda *_, **__: went_on.set() or 1 / 0)
    assert train(arguments(root, tmp_path)) == 1
    assert waits == [True] * 3
    assert all(checkpoint.verify(path) for path in checkpoint.checkpoints(tmp_path / "checkpoints"))


def test_what_is_captured_stays_while_training_goes_on_and_is_restored() -> None:
    step, fresh = (make(torch.float32, EMA=0.9, OPTIMIZER_NAME="AdamW") for _ in range(2))
    step(batch(0, ALL, torch.float32), 0)
    captured = StateCapture(step.model, step, step.ranks)()
    kept = {part: {name: t.clone() for name, t in entries.items()} for part, entries in captured.items()}
    step(batch(1, ALL, torch.float32), 1)
    assert captured.keys() == {"model", "optimizer", "average"}
    for part, entries in captured.items():
        assert all(torch.equal(t, kept[part][name]) for name, t in entries.items())
    restore(captured, fresh.model, fresh, fresh.ranks)
    again = StateCapture(fresh.model, fresh, fresh.ranks)()
    for part, entries in again.items():
        assert all(torch.equal(t, kept[part][name]) for name, t in entries.items())
    for part in captured:
        rest = {name: entries for name, entries in captured.items() if name != part}
        with pytest.raises(CheckpointError, match=rf"the state of the checkpoint does not .*\n.*\n  {part} +present"):
            restore(rest, fresh.model, fresh, fresh.ranks)
    with pytest.raises(CheckpointError, match="the average of the checkpoint does not fit"):
        restore(captured | {"average": {}}, fresh.model, fresh, fresh.ranks)


@pytest.mark.slow
def test_a_folder_that_not_all_processes_see_is_refused(root: Path, tmp_path: Path) -> None:
    """Two hosts with a disk of their own each; on resuming, one would wait for the other for ever."""
    folders = [tmp_path / "here", tmp_path / "there"]
    assert train(arguments(root, folders[0], SOLVER__MAX_EPOCHS=1, SOLVER__WARMUP_ITERS=0)) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = []
    for rank, folder in enumerate(folders):
        environment = {**os.environ, **address, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        argv = [sys.executable, str(ROOT / "engine/train.py"), *arguments(root, folder)]
        processes.append(subprocess.Popen(argv, env=environment, text=True, stderr=subprocess.PIPE))
    for process in processes:
        _, text = process.communicate(timeout=120)
        assert process.returncode == 2, text
        assert "OUTPUT_DIR" in text
        assert "must be shared: process 1 on host" in text
