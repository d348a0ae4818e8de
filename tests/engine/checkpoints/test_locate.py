"""TEST.WEIGHT: every way in which people name a checkpoint leads to it, and a wrong one to the newest."""

from pathlib import Path

import pytest
import torch

from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.load_model import find_checkpoint
from fusionreid.engine.checkpoints.locate import NoCheckpointError
from fusionreid.engine.config import Config, load_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints and, as every run, a manifest of its own."""
    for step in (3, 20):
        checkpoint.save(tmp_path / "run/checkpoints", step, {"model": {"w": torch.zeros(1)}}, {})
    (tmp_path / "run/manifest.json").write_text("{}")
    return tmp_path / "run"


def found(weight: Path | str, output: Path) -> Path:
    return find_checkpoint(Config.from_dict({"TEST": {"WEIGHT": str(weight)}, "OUTPUT_DIR": str(output)}))


@pytest.mark.parametrize(("name", "step"), [
    ("", 20), ("checkpoints", 20), ("checkpoints/", 20), ("checkpoints/step-00000003", 3),
    ("checkpoints/step-00000003/model.safetensors", 3),
])  # fmt: skip
def test_a_run_its_checkpoints_and_the_model_file(run: Path, tmp_path: Path, name: str, step: int) -> None:
    assert found(run / name, tmp_path / "other") == run / f"checkpoints/step-{step:08d}"


def test_files_of_the_published_code_and_damaged_folders_stay_what_they_are(run: Path, tmp_path: Path) -> None:
    (tmp_path / "FusionReID_180.pth").write_bytes(b"")
    assert found(tmp_path / "FusionReID_180.pth", run) == tmp_path / "FusionReID_180.pth"
    (run / "checkpoints/step-00000003/state.json").unlink()
    assert found(run / "checkpoints/step-00000003", run) == run / "checkpoints/step-00000003"  # reading it says more


def test_what_is_no_checkpoint_names_the_newest(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    newest = run / "checkpoints/step-00000020"
    for weight, what in ((tmp_path / "empty", "holds no checkpoint"), (tmp_path / "typo", "is not there")):
        with pytest.raises(
            NoCheckpointError, match=rf"TEST\.WEIGHT {weight} {what}: .* OUTPUT_DIR is {newest}"
        ) as caught:
            found(weight, run)
        assert caught.value.exit_code == 2
        with pytest.raises(NoCheckpointError, match=r"no checkpoint in OUTPUT_DIR .*empty either"):
            found(weight, tmp_path / "empty")


def test_home_is_written_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yml").write_text("OUTPUT_DIR: ~/log\nDATASETS:\n  ROOT_DIR: '~/data'\n")
    keys = ["MODEL.PRETRAIN_PATH", "MODEL.PRETRAIN_PATH_R", "MODEL.PRETRAIN_PATH_T", "TEST.WEIGHT", "TEST.EMBEDDINGS"]
    cfg = load_config(tmp_path / "a.yml", [f"{key}=~/{key}" for key in keys])
    assert (f"{tmp_path}/log", f"{tmp_path}/data") == (cfg.OUTPUT_DIR, cfg.DATASETS.ROOT_DIR)
    for key in keys:
        section, name = key.split(".")
        assert getattr(getattr(cfg, section), name) == f"{tmp_path}/{key}"
