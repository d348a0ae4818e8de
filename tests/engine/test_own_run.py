"""`train --data PATH` and `doctor --data PATH`: from any folder of crops to a run, with an account of every image."""

import csv
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from fusionreid.dataloading import shared_memory
from fusionreid.engine import cli, own_run
from fusionreid.engine.config import load_config
from fusionreid.weights import named
from tests.runs import draw_crops

SMALL = [
    *("MODEL.RES_NAME=test_resnet", "MODEL.TRANSFORMER_TYPE=test_vit", "MODEL.MIX_DIM=24", "INPUT.SIZE_TRAIN=(32, 16)"),
    *("INPUT.SIZE_TEST=(32, 16)", "SOLVER.MAX_EPOCHS=1", "DATALOADER.NUM_WORKERS=0", "SOLVER.PRECISION=fp32"),
]


@pytest.fixture
def crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight persons, two cameras, two images each, and files that are no images."""
    monkeypatch.chdir(tmp_path)
    draw_crops(tmp_path / "crops")
    shutil.copy("crops/anna 7/door/1.png", "crops/loose.png")
    return tmp_path / "crops"


def test_a_folder_is_trained_on_and_a_second_start_goes_on(crops: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--data", "crops", "--name", "shop", *SMALL]) == 0
    said = capsys.readouterr()
    folder = Path("log/shop")
    assert "6 persons to train on, 2 to test with" in said.err
    assert "training starts from random weights, which learn far less" in said.err  # without a network
    assert "SOLVER.BASE_LR 0.001: no pretrained weights could be fetched" in said.err
    assert "loose.png" in said.err
    assert json.loads((folder / "exit.json").read_text())["code"] == 0
    assert "anna 3" in (folder / "data.csv").read_text()
    (state,) = (json.loads(path.read_text()) for path in folder.glob("checkpoints/*/state.json"))
    assert state["camera_names"] == ["door", "hall"]
    before = (folder / "data.csv").read_bytes()
    (crops / "anna 9/hall").mkdir(parents=True)
    assert cli.main(["train", "--data", "crops", "--name", "shop", *SMALL]) == 0
    assert "going on with the list and the settings of log/shop/config.yml" in capsys.readouterr().err
    assert (folder / "data.csv").read_bytes() == before
    cfg = load_config(folder / "config.yml")
    assert (cfg.MODEL.PRETRAIN_CHOICE, cfg.SOLVER.BASE_LR) == ("none", 1e-3)
    assert (24, 4, str(folder.absolute())) == (cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE, cfg.OUTPUT_DIR)
    assert cli.main(["evaluate", "--config_file", "log/shop/config.yml", *SMALL]) == 0


def test_doctor_accounts_for_every_image_and_refuses_what_cannot_be_used(crops: Path, tmp_path: Path) -> None:
    assert cli.main(["doctor", "--data", "crops", "--json", "a.json", *SMALL]) == 0
    account = json.loads(Path("a.json").read_text())
    assert (account["found"], account["used"], account["verdict"]) == (33, 32, "warning")
    assert account["cameras"] == ["door", "hall"]
    assert account["persons"][0] == "anna 0"
    assert [path for paths in account["left_out"].values() for path in paths] == [str(crops / "loose.png")]
    (tmp_path / "empty").mkdir()
    assert cli.main(["doctor", "--data", "empty", "--json", "b.json"]) == 2
    assert json.loads(Path("b.json").read_text())["verdict"] == "wrong"
    assert cli.main(["doctor", "--config_file", "log/crops/config.yml", "--json", "c.json", *SMALL]) == 0
    assert json.loads(Path("c.json").read_text())["used"] == 32


KEYS = {"found", "used", "left_out", "persons", "cameras", "verdict", "warnings"}


def spoil(crops: Path) -> None:
    """Add what people's folders have: broken and turned images, copies, other spellings, junk."""
    image = (crops / "anna 0/hall/0.png").read_bytes()
    for path in (
        "anna 1/hall/of 0.png",
        "anna 2/door/copy.png",
        "Anna 3/hall/0.png",
        "-1/hall/x.png",
        "unknown/door/x.png",
    ):
        (crops / path).parent.mkdir(parents=True, exist_ok=True)
        (crops / path).write_bytes(image + path.encode())
    (crops / "anna 1/hall/of 0.png").write_bytes(image)
    (crops / "anna 2/door/copy.png").write_bytes((crops / "anna 2/door/1.png").read_bytes())
    (crops / "anna 4/hall/0.png").write_bytes(b"")
    (crops / "anna 5/hall/0.png").write_text("<html>404")
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (16, 32), "red").save(crops / "anna 6/hall/9.jpg", exif=exif)


def test_json_and_table_say_the_same_and_what_is_sound_can_be_trained_on(
    crops: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the table calls WRONG is wrong in the JSON; the clean list has none of it, and train --data takes it."""
    spoil(crops)
    assert cli.main(["train", "--data", "crops", *SMALL]) == 2
    refusal = capsys.readouterr().err
    assert "1 persons may be spelt in two ways: 'Anna 3' (1) = 'anna 3' (4)" in refusal
    assert "doctor --data crops --write-clean clean.csv writes a list without these images" in refusal
    assert not Path("log").exists()
    argv = ["doctor", "--data", "crops", "--json", "a.json", "--write-clean", "clean.csv", *SMALL]
    assert cli.main(argv) == 2
    said = capsys.readouterr()
    account = json.loads(Path("a.json").read_text())
    assert account.keys() >= KEYS
    assert account["verdict"] == "wrong"
    reasons: Counter[str] = Counter()
    for reason, paths in account["left_out"].items():
        reasons[reason.partition(":")[0]] += len(paths)
    assert sorted(reasons.items()) == [
        ("a bad image file", 2),
        ("in no person's folder, and its name does not begin with <person>_c<camera>", 1),
        ("its person may be spelt in two ways", 5),
        ("junk", 1),
        ("of nobody known", 1),
    ]
    assert account["found"] == account["used"] + sum(map(len, account["left_out"].values())) == 39
    warnings = "\n".join(account["warnings"])
    for text in (
        "spelt in two ways",
        "2 of 31 image files cannot be used",
        "given to two persons",
        "more than once",
        "EXIF",
    ):
        assert text in warnings
        assert text in said.out + said.err
    assert (account["cameras"], "anna 3" in account["persons"]) == (["door", "hall"], False)
    clean = Path("clean.csv").read_text().splitlines()
    assert clean[0] == "path,person,camera"
    assert len(clean) - 1 == account["used"] - 3  # the image of two persons, and a copy
    assert "26 of 39 images, 7 persons: train --data clean.csv" in said.out
    assert cli.main(["doctor", "--data", "clean.csv", "--json", "b.json", *SMALL]) == 0
    assert json.loads(Path("b.json").read_text())["used"] == 26
    assert cli.main(["train", "--data", "clean.csv", "--name", "shop", *SMALL]) == 0
    assert cli.main(["doctor", "--data", "crops", "--name", "shop", "--json", "c.json", *SMALL]) == 2  # as it is now
    assert json.loads(Path("c.json").read_text())["found"] == 39


def test_a_run_lies_where_it_is_told_to(crops: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["--data", "crops", "--print-config", "OUTPUT_DIR", "there", "SOLVER.MAX_EPOCHS", "3"]
    assert cli.main(["train", *said]) == 0
    assert "OUTPUT_DIR: there" in (captured := capsys.readouterr()).out
    assert Path("there/data.csv").is_file()
    assert "INFO SOLVER.MAX_EPOCHS" not in captured.err  # the reason of a value that is not taken
    for wrong in (["--name", "../there"], ["--name", "/tmp/there"], ["--name", ".."]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["train", "--data", "crops", *wrong])
        assert "must be the name of a folder in log" in capsys.readouterr().err
    for option in ("--json", "--write-clean"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["doctor", "--data", "crops", option, "nowhere/a.json"])
        assert "nowhere/a.json cannot be written: name a file in a folder that is there" in capsys.readouterr().err


def test_workers_fit_into_shared_memory(
    crops: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Docker gives 64 MB: what is chosen for the user must not be refused."""
    monkeypatch.setattr(own_run.os, "sched_getaffinity", lambda _: range(17))
    usage = shared_memory.shutil.disk_usage(crops)
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda _: usage._replace(free=64 * 2**20))
    assert cli.main(["train", "--data", "crops", "--print-config"]) == 0
    said = capsys.readouterr()
    assert "NUM_WORKERS: 5" in said.out
    assert "DATALOADER.NUM_WORKERS 5: there is no room for 8 in /dev/shm" in said.err


def test_weights_are_fetched_and_pinned_in_settings_and_manifest(crops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repository: str, _: str) -> str:
        path = crops.parent / f"{repository.partition('/')[2]}.safetensors"
        if not path.exists():
            save_file(timm.create_model(repository.partition("/")[2].partition(".")[0]).state_dict(), path)
        return str(path)

    monkeypatch.setattr(named, "fetch", fetch)
    assert cli.main(["train", "--data", "crops", "--name", "shop", *SMALL]) == 0
    model = load_config("log/shop/config.yml").MODEL
    digest = hashlib.sha256((crops.parent / "test_vit.r160_in1k.safetensors").read_bytes()).hexdigest()
    assert ("imagenet", f"test_vit.r160_in1k@sha256:{digest}") == (model.PRETRAIN_CHOICE, model.PRETRAIN_PATH_T)
    manifest = json.loads(Path("log/shop/manifest.json").read_text())
    assert manifest["config"]["MODEL"]["PRETRAIN_PATH_T"] == model.PRETRAIN_PATH_T
    assert f"{model.PRETRAIN_PATH_T}: " in Path("log/shop/log.txt").read_text()


def test_the_same_persons_through_every_reader_have_the_same_map(crops: Path, tmp_path: Path) -> None:
    """The same weights and the same split as --data has it, in folders, under Market's names and in another list."""
    assert cli.main(["train", "--data", "crops", "--name", "shop", *SMALL]) == 0
    with open("log/shop/data.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    market = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
    for number, row in enumerate(rows):
        person, camera, part = row["person"], row["camera"], row["split"]
        for path in (f"folder/{part}/{person}/{camera}/{number}.png",
                     f"market/{market[part]}/{person}_c{1 + (camera == 'hall')}_{number}.png"):  # fmt: skip
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(row["path"], path)
    lines = [";".join([row["split"], row["camera"], row["path"], row["person"]]) for row in rows]
    Path("list.csv").write_text("\n".join(["set;cam;file;id", *lines]), encoding="utf-16")
    found = []
    for name, place in {"csv": "log/shop/data.csv", "folder": "folder", "market": "market", "CSV": "list.csv"}.items():
        argv = [
            f"DATASETS.NAMES={name}",
            f"DATASETS.ROOT_DIR={place}",
            f"OUTPUT_DIR=log/{name}",
            "TEST.WEIGHT=log/shop",
        ]
        assert cli.main(["evaluate", "--config_file", "log/shop/config.yml", *SMALL, *argv]) == 0
        result = json.loads(Path(f"log/{name}/metrics.json").read_text())["results"]["FusionReID"]
        found.append((result["mAP"], result["mINP"], result["cmc"], result["valid_queries"]))
    assert found == [found[0]] * 4
    assert found[0][3] == 4
