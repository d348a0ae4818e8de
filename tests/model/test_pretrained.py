"""A missing weight file is named, with its key and the remedies, before torch is loaded."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusionreid.config import ModelConfig
from fusionreid.weights import WeightsError, check_weights


def test_placeholders_are_named_with_key_and_remedies() -> None:
    with pytest.raises(WeightsError) as error:
        check_weights(ModelConfig())
    for text in ("MODEL.PRETRAIN_PATH_R", "MODEL.PRETRAIN_PATH_T", "auto, which fetches", "MODEL.PRETRAIN_CHOICE none"):
        assert text in str(error.value)
    assert error.value.exit_code == 2


def test_only_what_is_used_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.touch()
    check_weights(ModelConfig(PRETRAIN_CHOICE="none"))
    check_weights(ModelConfig(PRETRAIN_PATH_R=str(path), TRANS_USE=False))
    check_weights(ModelConfig(PRETRAIN_PATH_T=str(path), RES_USE=False))
    with pytest.raises(WeightsError, match="PRETRAIN_PATH_T: no such file: 'your Transformer"):
        check_weights(ModelConfig(PRETRAIN_PATH_R=str(path)))


def test_a_missing_checkpoint_is_named_with_key_and_remedies(tmp_path: Path) -> None:
    for path in ("", str(tmp_path), str(tmp_path / "model.pth")):
        with pytest.raises(WeightsError) as error:
            check_weights(ModelConfig(PRETRAIN_CHOICE="checkpoint", PRETRAIN_PATH=path))
        for text in ("MODEL.PRETRAIN_PATH", repr(path), "state.json", "MODEL.PRETRAIN_CHOICE imagenet or none"):
            assert text in str(error.value)
    for name in ("model.pth", "model.safetensors", "state.json", "manifest.json"):
        (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / "model.pth"):
        check_weights(ModelConfig(PRETRAIN_CHOICE="checkpoint", PRETRAIN_PATH=str(path)))


def test_it_is_found_before_torch_is_imported() -> None:
    code = "import sys, fusionreid.weights.pretrained; sys.exit('torch' in sys.modules)"
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.monotonic() - start < 10
