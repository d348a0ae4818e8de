"""What the loop does when saving fails, when a mark is damaged, and when the loss scaler gives up."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.store import CheckpointStore
from fusionreid.engine.storage import StorageError
from fusionreid.engine.train import main as train
from fusionreid.engine.training.optim import LossScaler
from fusionreid.engine.training.train_step import TrainStep
from tests.runs import arguments


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize(("epoch", "code", "best"), [(2, 0, 0.2), (3, 4, 0.9)])
def test_a_disk_that_is_full_once_costs_a_checkpoint_and_at_the_end_the_success(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, code: int, best: float
) -> None:
    """And a best checkpoint is one that is there."""
    save, evaluated, scores = checkpoint.save, CheckpointStore.evaluated, iter((0.1, 0.9, 0.2))

    def full(folder: Path, step: int, tensors: dict, state: dict) -> Path:
        if state["epoch"] == epoch + 1:  # the next to train
            raise StorageError("no room: make some")
        return save(folder, step, tensors, state)

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr(CheckpointStore, "evaluated", lambda store, step, _: evaluated(store, step, next(scores)))
    assert train(arguments(root, tmp_path, SOLVER__EVAL_PERIOD=1)) == code
    mark = checkpoint.best(tmp_path / "checkpoints")
    assert mark is not None
    assert mark.path.is_dir()
    assert mark.score == best


@pytest.mark.parametrize("mark", ["{", "[]", ""])
def test_a_damaged_mark_of_the_best_is_told_at_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], mark: str
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.json").write_text(mark)
    monkeypatch.setattr("fusionreid.engine.training.trainer.TrainLoader", None)
    assert train(arguments(root, tmp_path)) == 3
    assert "best.json is damaged" in capfd.readouterr().err


def test_an_overflow_names_its_own_step(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionreid.engine.training.non_finite.SKIPPED_STEPS", 3)
    monkeypatch.setattr("fusionreid.engine.training.optim.LossScaler", partial(LossScaler, init_scale=2.0**100))
    assert train(arguments(root, tmp_path, SOLVER__PRECISION="fp16")) == 5
    found = json.loads((tmp_path / "non_finite.json").read_text())
    assert (found["epoch"], found["step"]) == (1, 2)


def test_an_output_folder_that_vanishes_costs_what_was_in_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainStep.__call__

    def vanishing(self: TrainStep, batch: object, number: int, stop: int) -> None:
        if number == 5:
            shutil.rmtree(tmp_path / "out")
        step(self, batch, number, stop)

    monkeypatch.setattr(TrainStep, "__call__", vanishing)
    assert train(arguments(root, tmp_path / "out", SOLVER__LOGGERS="[]")) == 0
    newest = checkpoint.latest(tmp_path / "out/checkpoints")
    assert newest is not None
    assert checkpoint.load(newest)[1]["epoch"] == 4


def test_a_lost_log_is_told_on_resuming(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(arguments(root, tmp_path, SOLVER__MAX_EPOCHS=1, SOLVER__WARMUP_ITERS=0)) == 0
    lines = tmp_path / "metrics.jsonl"
    whole = lines.read_bytes()
    monkeypatch.setattr("fusionreid.engine.training.trainer.Trainer._train_epoch", lambda _: 1 / 0)
    for damaged, message in (
        (whole.replace(b'"epoch": 1.0', b'"epoch": 7.0', 1), "1 of 4 lines are damaged and left out"),
        (whole[:20], "holds nothing of the first"),
    ):
        lines.write_bytes(damaged)
        train(arguments(root, tmp_path, SOLVER__MAX_EPOCHS=1, SOLVER__WARMUP_ITERS=0))
        assert message in capfd.readouterr().err
    lines.unlink()
    os.mkfifo(lines)  # neither read nor written, which would wait for ever
    assert train(arguments(root, tmp_path, SOLVER__MAX_EPOCHS=1, SOLVER__WARMUP_ITERS=0)) == 0
    assert "metrics.jsonl: [Errno 2] not a file" in capfd.readouterr().err
