"""The report from what runs left: drawn again by its command, compared with other runs, damage named."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fusionreid.engine.report import main as report
from fusionreid.engine.reporting.runs import differences, names_of
from tests.runs import arguments

RESULT = {"mAP": 0.5, "mINP": 0.25, "cmc": [0.75, 1.0], "valid_queries": 4}
SPLIT = {part: {"images": 1234, "persons": 7, "cameras": 2} for part in ("train", "query", "gallery")}


def leave(folder: Path, mean: float, layers: int, epochs: int = 2) -> Path:
    folder.mkdir(parents=True)
    results = {"FusionReID": RESULT | {"mAP": mean}, "re-ranked": RESULT}
    (folder / "metrics.json").write_text(json.dumps({"data": "<own>", "split": SPLIT, "results": results}))
    (folder / "manifest.json").write_text(json.dumps({"config": {"MODEL": {"HTM_LAYER": layers, "MIX_DIM": 768}}}))
    lines = [
        json.dumps({"epoch": i + 1, "loss": loss}) for i, loss in enumerate([8.0, float("nan"), 4.0][: epochs + 1])
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_report_is_drawn_again_without_a_model(tmp_path: Path) -> None:
    run = leave(tmp_path / "run", 0.625, 2)
    Image.new("RGB", (8, 8)).save(run / "ranks.png")
    with open(run / "metrics.jsonl", "a") as log:
        log.write('\n{"epoch": 3, "lo')  # killed while it wrote
    assert report(arguments(tmp_path, run)) == 0
    page = (run / "report.html").read_text()
    for shown in ("<td>FusionReID</td>", "62.5", "1,234", "&lt;own&gt;", "Training loss", "HTM_LAYER", "Rank lists"):
        assert shown in page, shown
    assert "Settings that differ" not in page
    assert "look at in each other" not in page, "there is no such picture"


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    one, two = leave(tmp_path / "a" / "log", 0.625, 2), leave(tmp_path / "b" / "log", 0.875, 3, epochs=0)
    assert report([*arguments(tmp_path, one), "--compare", str(two)]) == 0
    page = (one / "report.html").read_text()
    assert "<td>a/log, FusionReID</td><td>62.5</td>" in page
    assert '<td>b/log, FusionReID</td><td class="best">87.5</td>' in page
    assert "<td>MODEL.HTM_LAYER</td><td>2</td><td>3</td>" in page
    assert "MIX_DIM</td>" not in page
    assert page.count("<polyline") == 4 + 1, "four CMC curves, and one loss: the other run logged one step"


def test_what_is_missing_or_damaged_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = leave(tmp_path / "run", 0.5, 2)
    assert report([*arguments(tmp_path, run), "--compare", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none' / 'metrics.json'} is not there: evaluate that run first" in capsys.readouterr().err
    (run / "manifest.json").write_text("{")
    assert report(arguments(tmp_path, run)) == 2
    assert f"{run / 'manifest.json'} is damaged" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_names_tell_folders_apart() -> None:
    assert names_of([Path("/x/a/log"), Path("/x/b/log")]) == ["a/log", "b/log"]
    assert names_of([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert len(names_of([Path("/x/a"), Path("/x/a")])) == 2


def test_settings_that_one_run_lacks_differ() -> None:
    settings = [{"A": 1, "B": 2, "OUTPUT_DIR": "x"}, {"A": 1, "C": [3], "OUTPUT_DIR": "y"}]
    assert differences(settings) == [["B", "2", ""], ["C", "", "[3]"]]
