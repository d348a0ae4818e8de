"""`train --data PATH` and `doctor --data PATH`: from any folder of crops to a run, with an account of every image."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fusionreid.engine import cli
from fusionreid.engine.config import load_config

SMALL = [
    *("MODEL.RES_NAME=test_resnet", "MODEL.TRANSFORMER_TYPE=test_vit", "MODEL.MIX_DIM=24", "INPUT.SIZE_TRAIN=(32, 16)"),
    *("INPUT.SIZE_TEST=(32, 16)", "SOLVER.MAX_EPOCHS=1", "DATALOADER.NUM_WORKERS=0", "SOLVER.PRECISION=fp32"),
]


@pytest.fixture
def crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight persons, two cameras, two images each, and files that are no images."""
    monkeypatch.chdir(tmp_path)
    for person in range(8):
        for camera in ("hall", "door"):
            for number in range(2):
                path = tmp_path / "crops" / f"anna {person}" / camera / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 32), (20 * person, 90 * number, 50 + 100 * (camera == "hall"))).save(path)
    (tmp_path / "crops/loose.png").write_bytes(path.read_bytes())
    return tmp_path / "crops"


def test_a_folder_is_trained_on_and_a_second_start_goes_on(crops: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--data", "crops", "--name", "shop", *SMALL]) == 0
    said = capsys.readouterr()
    folder = Path("log/shop")
    assert "6 persons to train on, 2 to test with" in said.err
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
