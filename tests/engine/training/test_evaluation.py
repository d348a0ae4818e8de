"""Evaluations during training are logged like the loss and end soon after a signal; a trainer handles no signals."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.config import load_config
from fusionreid.engine.evaluate import main as evaluate
from fusionreid.engine.evaluation import embeddings, extract
from fusionreid.engine.search import main as search
from fusionreid.engine.train import main as train
from fusionreid.engine.training.trainer import Trainer
from tests.numerics import assert_close
from tests.runs import arguments

MEASURES = {"eval/mAP", "eval/rank1", "eval/rank5", "eval/rank10", "eval/mINP"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def evaluations(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/mAP" in line]


def test_every_evaluation_is_a_line_and_a_point_of_each_curve(root: Path, tmp_path: Path) -> None:
    assert train(arguments(root, tmp_path, SOLVER__EVAL_PERIOD=1)) == 0
    lines = evaluations(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(line.keys() == {"step", "epoch", "crc32", *MEASURES} for line in lines)
    assert all(0 < line["eval/mAP"] <= 1 and line["eval/rank1"] <= line["eval/rank10"] for line in lines)
    best = checkpoint.best(tmp_path / "checkpoints")
    assert best is not None
    assert best.score == max(line["eval/mAP"] for line in lines)
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in curves.Scalars("eval/mAP")] == [line["step"] for line in lines]
    assert set(curves.Tags()["scalars"]) >= MEASURES


def test_a_trained_run_can_be_searched_with_the_vectors_that_evaluate_stores(root: Path, tmp_path: Path) -> None:
    argv = arguments(root, tmp_path, SOLVER__MAX_EPOCHS=2, SOLVER__EVAL_PERIOD=1)
    assert train(argv) == 0
    assert search(["--query", str(tmp_path), "--gallery", str(tmp_path)]) == 0
    stored = embeddings.load(tmp_path / "embeddings")
    assert stored.source["checkpoint"] == str(checkpoint.latest(tmp_path / "checkpoints"))
    assert evaluate(argv) == 0
    again = embeddings.load(tmp_path / "embeddings")
    assert (stored.records, stored.num_query, stored.source) == (again.records, again.num_query, again.source)
    assert_close("vectors", stored.features, again.features, 1e-5)


@pytest.mark.parametrize("epoch", [1, 3])  # 3: the last one, after which no step looks at the signal any more
def test_a_signal_ends_an_evaluation_at_its_next_batch(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    embedded, embed = [], extract.feature_vectors

    def interrupted(*args: object, **options: object) -> object:
        embedded.append(len(embedded))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # a thread reads signals
        return embed(*args, **options)

    monkeypatch.setattr(extract, "feature_vectors", interrupted)
    assert train(arguments(root, tmp_path, SOLVER__EVAL_PERIOD=epoch, TEST__IMS_PER_BATCH=4)) == 143
    assert embedded == [0], "of nine batches"
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert checkpoint.load(newest)[1]["epoch"] == epoch + 1, "the checkpoint was written before the evaluation"
    assert evaluations(tmp_path) == []


def test_a_trainer_leaves_the_signals_of_its_process_alone(root: Path, tmp_path: Path) -> None:
    _, path, *overrides = arguments(root, tmp_path, SOLVER__MAX_EPOCHS=1, SOLVER__WARMUP_ITERS=0)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    trainer = Trainer(load_config(path, overrides))
    assert [signal.getsignal(number) for number in numbers] == before
    trainer.train()
    assert [signal.getsignal(number) for number in numbers] == before
