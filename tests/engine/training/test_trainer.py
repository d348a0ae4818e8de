"""What the loop does when saving fails, when a mark is damaged, and when the loss scaler gives up."""

import json
from functools import partial
from pathlib import Path

import pytest

from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.storage import StorageError
from fusionreid.engine.train import main as train
from fusionreid.engine.training.optim import LossScaler
from tests.runs import arguments


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize(("epoch", "code", "best"), [(2, 0, 0.2), (3, 4, 0.9)])
def test_a_disk_that_is_full_once_costs_a_checkpoint_and_at_the_end_the_success(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, code: int, best: float
) -> None:
    """And a best checkpoint is one that is there."""
    save, scores = checkpoint.save, iter((0.1, 0.9, 0.2))

    def full(folder: Path, step: int, tensors: dict, state: dict) -> Path:
        if state["epoch"] == epoch + 1:  # the next to train
            raise StorageError("no room: make some")
        return save(folder, step, tensors, state)

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr("fusionreid.engine.evaluation.retrieval.Ranking.mAP", property(lambda _: next(scores)))
    monkeypatch.setattr("fusionreid.engine.evaluation.retrieval.Ranking.summary", lambda _: "")
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
