"""Whole runs through the commands: train, stop, die, go on, evaluate, on one process and on two."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fusionreid.dataloading.decode import decode_batch
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.evaluate import main as evaluate
from fusionreid.engine.reporting.queries import SHOWN_QUERIES
from fusionreid.engine.train import main as train
from tests.runs import arguments, command, finish, interrupt


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def unbroken(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken")
    code, text = finish(command(*arguments(root, output)))
    assert code == 0, text
    return output


def last(output: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, object]]:
    path = checkpoint.latest(output / "checkpoints")
    assert path is not None
    return checkpoint.load(path)


def lines(output: Path, has: str = "loss") -> list[dict[str, object]]:
    every = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if has in line]


def test_a_run_leaves_what_people_look_for(unbroken: Path) -> None:
    losses = [line["loss"] for line in lines(unbroken)]
    assert len(losses) == last(unbroken)[1]["step"]
    assert losses[-1] < losses[0]
    assert set(lines(unbroken)[-1]) >= {
        "step",
        "epoch",
        "identity",
        "triplet",
        "accuracy",
        "learning_rate",
        "images_per_s",
    }
    assert list((unbroken / "tensorboard").glob("events*"))
    assert json.loads((unbroken / "exit.json").read_text())["code"] == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_broken_run_ends_in_the_same_bits(root: Path, unbroken: Path, tmp_path: Path, number: signal.Signals) -> None:
    step = random.Random(number).randint(3, 7)
    code, text = interrupt(command(*arguments(root, tmp_path)), tmp_path, step, number)
    assert code == (143 if number == signal.SIGTERM else -9), text
    code, text = finish(command(*arguments(root, tmp_path)))
    assert code == 0, text
    assert "resumed from" in text
    ours, theirs = last(tmp_path)[0], last(unbroken)[0]
    best, expected = (checkpoint.best(output / "checkpoints") for output in (tmp_path, unbroken))
    assert best is not None and expected is not None  # noqa: PT018
    assert (best.path.name, best.score) == (expected.path.name, expected.score)
    for part in ("model", "optimizer"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])
    steps = [(line["step"], line["loss"]) for line in lines(tmp_path)]
    assert steps == [(line["step"], line["loss"]) for line in lines(unbroken)]
    assert lines(tmp_path, "eval/mAP") == lines(unbroken, "eval/mAP")


def test_evaluations_of_a_run_decode_query_and_gallery_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def counting(paths: list[str], *how: Any) -> torch.Tensor:
        decoded.extend(paths)
        return decode_batch(paths, *how)

    monkeypatch.setattr("fusionreid.dataloading.decode_workers.decode_batch", counting)
    assert train(arguments(tmp_path, tmp_path, SOLVER__EVAL_PERIOD=1)) == 0
    images = list((tmp_path / "synthetic").glob("*/*.jpg"))
    assert sorted(decoded) == sorted(map(str, images))
    assert evaluate(arguments(tmp_path, tmp_path)) == 0
    assert len(decoded[len(images) :]) <= 3 * SHOWN_QUERIES, "only to see where the model looks"
    mAP = json.loads((tmp_path / "metrics.json").read_text())["results"]["FusionReID"]["mAP"]
    assert evaluate(arguments(tmp_path, tmp_path, DATALOADER__CACHE="none")) == 0
    assert len(decoded) > len(images) + 2 * SHOWN_QUERIES
    assert json.loads((tmp_path / "metrics.json").read_text())["results"]["FusionReID"]["mAP"] == mAP


def test_two_processes_train_and_one_evaluates(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = finish(command(*arguments(root, tmp_path), processes=2))
    assert code == 0, text
    assert evaluate([*arguments(root, tmp_path, TEST__RE_RANKING="yes"), "--baselines"]) == 0
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert results.keys() == {"FusionReID", "re-ranked", "untrained", "colour histogram"}
    assert results["re-ranked"] != results["FusionReID"]
    assert f"mAP {100 * results['FusionReID']['mAP']:.1f} %" in text
    assert "Rank-10" in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_every_option_of_the_recipe_trains_and_resumes(root: Path, tmp_path: Path) -> None:
    keys = {"MODEL__IF_WITH_CENTER": "yes", "SOLVER__PRECISION": "bf16", "SOLVER__TRIPLET_PRODUCTS": "amp",
            "MODEL__NO_MARGIN": "no", "SOLVER__OPTIMIZER_NAME": "SGD", "SOLVER__MAX_GRAD_NORM": 1.0,
            "TEST__RE_RANKING": "published", "SOLVER__MAX_EPOCHS": 2, "SOLVER__ACCUMULATE": 2, "SOLVER__EMA": 0.9,
            "PARALLEL__CHECKPOINT": "yes", "MODEL__ID_LOSS_TYPE": "arcface"}  # fmt: skip
    assert train(arguments(root, tmp_path, **keys)) == 0
    first = last(tmp_path)[0]
    path = checkpoint.checkpoints(tmp_path / "checkpoints")[-1]
    path.rename(tmp_path / "aside")
    assert train(arguments(root, tmp_path, **keys)) == 0
    again = last(tmp_path)[0]
    for part, name in (("centers", "centers"), ("average", "heads.0.classifier.weight")):
        assert torch.equal(first[part][name], again[part][name])
    assert not torch.equal(first["average"][name], first["model"][name])


def test_a_finished_run_is_not_trained_again(root: Path, unbroken: Path) -> None:
    before = (unbroken / "metrics.jsonl").read_text()
    assert train(arguments(root, unbroken)) == 0
    assert (unbroken / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("keys", "code", "words"),
    [
        ({"MODEL__RES_NAME": "resnot50"}, 2, "resnot50"),
        ({"MODEL__TRANSFORMER_TYPE": "vit_bse"}, 2, "vit_bse"),
        ({"SOLVER__BASE_LR": "1e30"}, 5, "is not finite"),
        ({"SOLVER__IMS_PER_BATCH": "64"}, 2, "8 persons to train on, a batch needs 16"),
        ({"DATASETS__NAMES": "market1501"}, 2, "bounding_box_train"),
        ({"MODEL__PRETRAIN_CHOICE": "imagenet"}, 2, "MODEL.PRETRAIN_PATH_R"),
        ({"SOLVER__BASE_LRR": "1"}, 2, "did you mean SOLVER.BASE_LR"),
        ({"MODEL__DEVICE": "cuda"}, 2, "MODEL.DEVICE"),
    ],
)
def test_what_cannot_be_done_says_why(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], keys: dict[str, str], code: int, words: str
) -> None:
    if "MODEL__DEVICE" in keys and torch.cuda.is_available():
        pytest.skip("here the device is there")
    assert train(arguments(root, tmp_path, **keys)) == code
    assert words in capfd.readouterr().err
    assert not checkpoint.checkpoints(tmp_path / "checkpoints")


def test_fp16_survives_an_overflow_in_its_first_steps(root: Path, tmp_path: Path) -> None:
    keys = {"SOLVER__OPTIMIZER_NAME": "SGD", "SOLVER__BASE_LR": 0.005, "SOLVER__PRECISION": "fp16"}
    assert train(arguments(root, tmp_path, **keys)) == 0
    weights = last(tmp_path)[0]["model"].values()
    assert all(weight.isfinite().all() for weight in weights if weight.is_floating_point())


def test_a_failed_evaluation_loses_no_training(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fusionreid.engine.training.trainer.evaluate", fail)
    assert train(arguments(root, tmp_path)) == 6
    assert last(tmp_path)[1]["epoch"] == 4


def test_one_camera_cannot_be_evaluated_and_says_so_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for part, persons in (("train", range(1, 9)), ("query", (20, 21)), ("gallery", (20, 21))):
        for person in persons:
            folder = tmp_path / "own" / part / str(person)
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (16, 32), (person, number, 9)).save(folder / f"c1_{number}.png")
    keys = {"DATASETS__NAMES": "folder"}
    assert train(arguments(tmp_path / "own", tmp_path / "out", **keys)) == 2
    assert "another camera" in capfd.readouterr().err


def test_a_run_with_another_configuration_is_not_continued(
    root: Path, unbroken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fusionreid.engine.training.trainer.TrainLoader", None
        )  # which may have every image to decode first
        assert train(arguments(root, unbroken, SOLVER__BASE_LR="1e-3")) == 3
        assert "SOLVER.BASE_LR" in capfd.readouterr().err
        assert train(arguments(root, tmp_path, SOLVER__ACCUMULATE=5)) == 2
        assert "SOLVER.ACCUMULATE must divide" in capfd.readouterr().err


def test_an_unseen_camera_is_an_error_or_the_mean(
    root: Path, unbroken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    three = {"DATASETS__SYNTHETIC__CAMERAS": "3", "TEST__WEIGHT": checkpoint.latest(unbroken / "checkpoints")}
    assert evaluate(arguments(tmp_path, tmp_path, **three)) == 2
    assert "TEST.SIE_UNKNOWN mean" in capfd.readouterr().err
    assert evaluate(arguments(tmp_path, tmp_path, **three, TEST__SIE_UNKNOWN="mean")) == 0


def test_a_bad_image_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(arguments(tmp_path, tmp_path / "first", SOLVER__MAX_EPOCHS=1, SOLVER__WARMUP_ITERS=0)) == 0
    image = next((tmp_path / "synthetic" / "bounding_box_train").glob("*.jpg"))
    image.write_bytes(image.read_bytes()[:200])
    assert train(arguments(tmp_path, tmp_path / "second")) == 2
    assert image.name in capfd.readouterr().err
