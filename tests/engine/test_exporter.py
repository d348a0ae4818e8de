"""Exported programs: the same vectors as evaluation finds, at any batch size, or no file and a reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusionreid.dataloading import read_split
from fusionreid.dataloading.loader import TestLoader
from fusionreid.engine import exporter
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import load_config
from fusionreid.engine.evaluation.extract import feature_vectors
from fusionreid.engine.export import main as export
from tests.runs import arguments


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an untrained model that knows two cameras."""
    root = tmp_path_factory.mktemp("export")
    _, path, *overrides = arguments(root, root)
    cfg = load_config(path, overrides)
    torch.manual_seed(3)
    state = {"classes": 5, "cameras": (0, 1), "config": cfg.model_dump(mode="json")}
    return checkpoint.save(root, 1, {"model": build(cfg, 5, 2).state_dict()}, state)


def exported(weights: Path, output: Path, **keys: object) -> int:
    argv = arguments(output.parent, output.parent / "log", TEST__WEIGHT=weights, **keys)
    return export(["--output", str(output), *argv])


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
@pytest.mark.parametrize("keys", [{}, {"TEST__FLIP": "yes", "TEST__FEAT_NORM": "no", "TEST__FEAT": 3}])
def test_a_program_finds_what_evaluation_finds(weights: Path, tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    """On rendered images, in a batch larger than any it was traced or checked with."""
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript", reason="ONNX needs the extra export")
    assert exported(weights, tmp_path / name, **keys) == 0
    _, path, *overrides = arguments(tmp_path, tmp_path, **keys)
    cfg = load_config(path, overrides)
    records = read_split(cfg.DATASETS).gallery[:7]
    model = build(cfg, 5, 2).eval()
    model.load_state_dict(checkpoint.load(weights)[0]["model"])
    (batch,) = TestLoader(records, cfg.INPUT, cfg.DATALOADER, batch_size=7)
    pixels = ((batch.images.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().contiguous()
    cameras = torch.tensor([-1, 0, 1, -1, 0, 1, 1])
    with torch.no_grad():
        expected = feature_vectors(model, batch.images, cameras, test=cfg.TEST)
        found = exporter.FORMATS[Path(name).suffix][1](tmp_path / name)(pixels, cameras)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5 * expected.abs().max().item())
    said = json.loads((tmp_path / f"{name}.json").read_text())
    assert said["cameras"]["known"] == [0, 1]
    assert 0 <= said["check"]["error of a vector, relative to its length"] < 1e-5
    assert sorted(p.name for p in tmp_path.glob("*model*")) == sorted([name, f"{name}.json"])  # nothing aside


def test_a_program_that_computes_something_else_is_not_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, read = exporter.FORMATS[".pt2"]
    wrong = {".pt2": (write, lambda path: lambda *inputs: read(path)(*inputs) * torch.tensor(1.001))}
    monkeypatch.setattr(exporter, "FORMATS", wrong)
    assert exported(weights, tmp_path / "model.pt2") == 1
    assert "off by 1.0e-03 of their length" in capsys.readouterr().err
    assert not list(tmp_path.glob("*model*"))


@pytest.mark.parametrize(("output", "missing", "text"), [
    ("model.pth", (), "--output must end in .onnx or .pt2"),
    ("nowhere/model.pt2", (), "there is no folder"),
    ("folder.pt2", (), "is a folder"),
    ("model.onnx", ("onnxscript",), "pip install 'fusionreid[export]'"),
])  # fmt: skip
def test_what_cannot_be_written_is_said(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    output: str, missing: tuple[str, ...], text: str,
) -> None:  # fmt: skip
    (tmp_path / "folder.pt2").mkdir()
    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name in missing else True)
    argv = arguments(tmp_path, tmp_path / "log", TEST__WEIGHT=weights)
    assert export(["--output", str(tmp_path / output), *argv]) == 2
    assert text in capsys.readouterr().err
