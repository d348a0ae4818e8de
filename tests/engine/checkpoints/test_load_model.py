"""Which checkpoint is evaluated, the newest unless another is asked for, and that a forged one is refused."""

from pathlib import Path

import pytest
import torch

from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.checkpoint import CheckpointError, DamagedError
from fusionreid.engine.checkpoints.load_model import build, config_of, find_checkpoint, restore, restore_as_trained
from fusionreid.engine.checkpoints.retention import Progress
from fusionreid.engine.config import Config, load_config
from fusionreid.weights.reading import read_tensors
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
    with pytest.raises(CheckpointError, match=r"step-00000002: its state\.json .*camera_names"):
        restore_as_trained(checkpoint.save(folder, 2, tensors, {**state, "camera_names": names}))
    del state["camera_names"]  # as before they were kept
    assert restore_as_trained(checkpoint.save(folder, 3, tensors, state))[0].camera_names == ("1", "2")


def deep() -> object:
    value: object = 0
    for _ in range(900):
        value = [value]
    return value


@pytest.mark.parametrize("state", [{}, {"config": deep()}, {"config": [1]}, {"config": {"SOLVER": {"BASE_LR": "x"}}}])
def test_a_forged_configuration_is_refused(tmp_path: Path, state: dict) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        config_of(state, tmp_path)


COUNTS = [("classes", 10**9), ("classes", 9), ("classes", "8"), ("classes", -1), ("cameras", []), ("cameras", [10**9]),
          ("cameras", 3), ("cameras", [None])]  # fmt: skip


@pytest.mark.parametrize(("key", "forged"), COUNTS)
def test_forged_counts_are_refused_before_memory_is_taken(tmp_path: Path, key: str, forged: object) -> None:
    cfg = asked(tmp_path, "")
    model = build(cfg, 8, 2)
    state = {"config": cfg.model_dump(mode="json"), "classes": 8, "cameras": [0, 1]}
    assert restore(checkpoint.save(tmp_path, 1, {"model": model.state_dict()}, state), cfg).cameras == (0, 1)
    path = checkpoint.save(tmp_path, 2, {"model": model.state_dict()}, state | {key: forged})
    with pytest.raises(CheckpointError, match=r"state\.json (is not valid|says \d+ persons)"):
        restore(path, cfg)


def test_a_model_file_is_verified_whatever_else_is_left_of_its_checkpoint(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(8)}}, {})
    link = tmp_path / "weights.safetensors"
    link.symlink_to(path / "model.safetensors")
    assert read_tensors(link)["w"].tolist() == [1.0] * 8
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 64
    (path / "model.safetensors").write_bytes(data)
    for remaining in ("a link", "no state.json"):
        with pytest.raises(DamagedError):
            read_tensors(link if remaining == "a link" else path / "model.safetensors")
        (path / "state.json").unlink(missing_ok=True)
