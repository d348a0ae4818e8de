"""Training on several data sets and evaluating on each: rows, folders, cameras, the commands around them."""

import json
from pathlib import Path

import pytest

from fusionreid.dataloading.datasets.synthetic import render_dataset
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.config import ConfigError, load_config
from fusionreid.engine.doctor import main as doctor
from fusionreid.engine.evaluate import main as evaluate
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.train import main as train
from tests.runs import arguments


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second rendered set with the same names, `shop`."""
    folder = tmp_path_factory.mktemp("data")
    render_dataset(folder / "shop", persons=8, test_persons=3, cameras=2, images=2, seed=5, size=(32, 16))
    return folder


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("log")
    assert train(of_both(root, output, SOLVER__MAX_EPOCHS=1, DATALOADER__BALANCE_SETS="yes")) == 0
    return output


def of_both(root: Path, output: Path, **keys: object) -> list[str]:
    return arguments(root, output, **{"DATASETS__NAMES": f"[synthetic, market:{root}/shop]", **keys})


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_each_set_has_its_row_and_its_report_and_the_first_decides(trained: Path) -> None:
    results = metrics(trained)["results"]
    assert [*results] == ["synthetic", "shop"]
    assert [result["valid_queries"] for result in results.values()] == [8, 6]
    assert metrics(trained / "test/shop")["results"]["shop"] == results["shop"]
    assert (trained / "test/shop/report.html").is_file()
    assert ">shop<" in (trained / "report.html").read_text()
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    first, second = (next(line for line in lines if key in line) for key in ("eval/mAP", "eval/shop/mAP"))
    assert first["eval/mAP"] == results["synthetic"]["mAP"]
    assert second["eval/shop/mAP"] == results["shop"]["mAP"]
    best = checkpoint.best(trained / "checkpoints")
    assert best is not None
    assert best.score == first["eval/mAP"]
    state = checkpoint.load(best.path)[1]
    assert (state["classes"], state["camera_names"]) == (16, ["synthetic/1", "synthetic/2", "shop/1", "shop/2"])


def test_a_checkpoint_is_evaluated_on_any_of_its_sets_as_in_training(
    root: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = {"TEST__WEIGHT": trained}
    assert evaluate(of_both(root, tmp_path / "both", **weights)) == 0
    table = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in table if line.startswith(("synthetic ", "shop "))] == ["synthetic", "shop"]
    only = {"DATASETS__TEST": f"market:{root}/shop", **weights}
    assert evaluate(of_both(root, tmp_path / "one", **only)) == 0
    during = metrics(trained)["results"]
    assert {name: row["mAP"] for name, row in metrics(tmp_path / "both")["results"].items()} == pytest.approx(
        {name: row["mAP"] for name, row in during.items()}
    )
    assert metrics(tmp_path / "one")["results"]["FusionReID"]["mAP"] == pytest.approx(during["shop"]["mAP"])
    stored = embeddings.load(tmp_path / "one/embeddings")
    assert {record.camera for record in stored.records} == {2, 3}
    assert stored.source["names"]["cameras"]["2"] == "1"
    assert {*embeddings.load(tmp_path / "both/test/shop/embeddings").source["names"]["persons"].values()} >= {"0009"}


def test_cameras_of_a_set_that_is_not_trained_on_follow_the_rule(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = {"DATASETS__TEST": f"[synthetic, market:{root}/shop]", "SOLVER__MAX_EPOCHS": 1}
    assert train(arguments(root, tmp_path, **keys)) == 2
    assert (
        "trained on synthetic: its camera embeddings are of other cameras than those of shop" in capfd.readouterr().err
    )
    assert train(arguments(root, tmp_path, **keys, TEST__SIE_UNKNOWN="mean")) == 0
    assert [*metrics(tmp_path)["results"]] == ["synthetic", "shop"]


def test_the_doctor_examines_every_set(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    account = tmp_path / "account.json"
    assert doctor([*of_both(root, tmp_path / "log"), "--json", str(account)]) == 0
    told = capfd.readouterr().out
    assert "synthetic: 8 queries in 28 images" in told
    assert "shop: 6 queries in 7 images" in told
    assert json.loads(account.read_text())["cameras"] == ["synthetic/1", "synthetic/2", "shop/1", "shop/2"]


@pytest.mark.parametrize("names", ["[market1501, csv:shop.csv]", "market1501, csv:shop.csv"])
def test_several_names_on_the_command_line(names: str, root: Path) -> None:
    path, *keys = arguments(root, root)[1:]
    cfg = load_config(path, [*keys, f"DATASETS.NAMES={names}", "DATASETS.TEST=msmt17"])
    assert [(one.NAMES, one.ROOT_DIR) for one in cfg.DATASETS.sets] == [
        ("market1501", str(root)),
        ("csv", "shop.csv"),
    ]
    assert cfg.from_dict(json.loads(json.dumps(cfg.model_dump(mode="json")))) == cfg
    with pytest.raises(ConfigError, match=r"DATASETS.NAMES: must be a data set, or a list of them, got 3"):
        load_config(path, [*keys, "DATASETS.NAMES=3"])
