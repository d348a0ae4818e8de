"""Exported programs: the same vectors as evaluation finds, at any batch size, or no file and a reason."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fusionreid.dataloading import read_split
from fusionreid.dataloading.loader import TestLoader
from fusionreid.engine import exporter
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import load_config
from fusionreid.engine.evaluation.extract import feature_vectors
from fusionreid.engine.export import main as export
from tests.runs import ROOT, arguments


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


def metadata(path: Path) -> dict[str, Any]:
    """What an ONNX file says of itself."""
    import onnxruntime

    return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map[exporter.METADATA])


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
    assert said["cameras"]["known"] == {"1": 0, "2": 1}
    if name.endswith("onnx"):
        assert metadata(tmp_path / name) == {key: value for key, value in said.items() if key != "blake2b"}
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
    ("model.pt2 --precision int8", (), "--precision int8 is for .onnx"),
])  # fmt: skip
def test_what_cannot_be_written_is_said(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    output: str, missing: tuple[str, ...], text: str,
) -> None:  # fmt: skip
    (tmp_path / "folder.pt2").mkdir()
    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name in missing else True)
    argv = arguments(tmp_path, tmp_path / "log", TEST__WEIGHT=weights)
    name, *options = output.split()
    assert export(["--output", str(tmp_path / name), *options, *argv]) == 2
    assert text in capsys.readouterr().err


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a model of configs/own/cameras.yml, small and untrained: it knows no cameras."""
    root = tmp_path_factory.mktemp("own")
    keys = {"MODEL.RES_NAME": "test_resnet", "MODEL.TRANSFORMER_TYPE": "test_vit", "MODEL.STRIDE_SIZE": "(16, 16)",
            "MODEL.MIX_DIM": 24, "INPUT.SIZE_TRAIN": "(64, 32)", "INPUT.SIZE_TEST": "(64, 32)",
            "DATASETS.ROOT_DIR": root / "crops.csv", "OUTPUT_DIR": root / "log"}  # fmt: skip
    overrides = [f"{key}={value}" for key, value in keys.items()]
    rows = ["path,person,camera,split"]
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        rows.append(f"{i}.png,{i % 4},{i // 12},{('train', 'query', 'gallery')[(i // 4) % 3]}")
    (root / "crops.csv").write_text("\n".join(rows))
    cfg = load_config("own/cameras", overrides)
    torch.manual_seed(4)
    state = {"classes": 4, "cameras": (0,), "config": cfg.model_dump(mode="json")}
    checkpoint.save(root / "log/checkpoints", 1, {"model": build(cfg, 4, 1).state_dict()}, state)
    return ["--config_file", "own/cameras", *overrides]


def test_the_manuals_snippet_runs_on_a_model_of_own_cameras(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs, size and cameras come from the file itself."""
    pytest.importorskip("onnxscript", reason="ONNX needs the extra export")
    monkeypatch.chdir(tmp_path)
    assert export(["--output", "model.onnx", *own]) == 0
    Image.new("RGB", (50, 90), "red").save("a.jpg")
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(snippet, "export.md", "exec"), found)
    assert found["vectors"].ndim == 2
    np.testing.assert_allclose(np.linalg.norm(found["vectors"], axis=1), 1, atol=1e-4)
    assert found["about"]["cameras"] is None
    assert found["about"]["normalisation"]["inside"]
    assert found["about"]["images"]["shape"] == ["B", 64, 32, 3]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_a_smaller_file_costs_is_measured_told_and_kept_in_it(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    pytest.importorskip("onnxscript", reason="ONNX needs the extra export")
    file = tmp_path / "small.onnx"
    assert export(["--output", str(file), "--precision", precision, *own]) == 0
    about = metadata(file)
    assert (about["precision"], about["accuracy"]["queries"], about["accuracy"]["gallery"]) == (precision, 8, 8)
    assert 0.99 < about["accuracy"]["cosine to fp32"]["least"] <= about["accuracy"]["cosine to fp32"]["median"] < 1.001
    mean = about["accuracy"]["mAP"]
    assert 0 <= mean["here"] <= 1
    assert f"mAP {100 * mean['fp32']:.1f} -> {100 * mean['here']:.1f} %" in capsys.readouterr().out
    assert json.loads((tmp_path / "small.onnx.json").read_text())["accuracy"] == about["accuracy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx", "small.onnx.json"]
