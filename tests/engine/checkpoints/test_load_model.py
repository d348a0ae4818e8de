"""Which checkpoint is evaluated: the newest, unless another is asked for."""

from pathlib import Path

import pytest
import torch

from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.checkpoint import CheckpointError
from fusionreid.engine.checkpoints.load_model import find_checkpoint, restore_as_trained
from fusionreid.engine.checkpoints.retention import Progress
from fusionreid.engine.config import Config, load_config
from tests.runs import arguments, untrained


def asked(output: Path, weight: str) -> Config:
    _, path, *overrides = arguments(output, output, TEST__WEIGHT=weight)
    return load_config(path, overrides)


def test_newest_unless_the_best_or_another_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(CheckpointError, match="train first"):
        find_checkpoint(asked(tmp_path, "best"))
    saved = [checkpoint.save(folder, step, {"model": {"w": torch.zeros(1)}}, {}) for step in (1, 2)]
    with pytest.raises(CheckpointError, match=r"no checkpoint .* has been evaluated"):
        find_checkpoint(asked(tmp_path, "best"))
    checkpoint.write_progress(folder, Progress(2, best=1, score=0.5))
    assert find_checkpoint(asked(tmp_path, "")) == saved[1]
    assert find_checkpoint(asked(tmp_path, "best")) == saved[0]
    elsewhere = tmp_path / "elsewhere.pth"
    elsewhere.touch()
    assert find_checkpoint(asked(tmp_path, str(elsewhere))) == elsewhere


@pytest.mark.parametrize("names", [["hall"], ["hall", 1], "ab", {"0": "hall", "1": "door"}])
def test_names_that_are_not_those_of_the_cameras_are_refused(tmp_path: Path, names: object) -> None:
    folder = untrained(tmp_path / "run", ("hall", "door")) / "checkpoints"
    tensors, state = checkpoint.load(checkpoint.folder_of(folder, 1))
    with pytest.raises(CheckpointError, match=r"step-00000002: camera_names .* are not those of 2 cameras"):
        restore_as_trained(checkpoint.save(folder, 2, tensors, {**state, "camera_names": names}))
    del state["camera_names"]  # as before they were kept
    assert restore_as_trained(checkpoint.save(folder, 3, tensors, state))[0].camera_names == ("1", "2")
