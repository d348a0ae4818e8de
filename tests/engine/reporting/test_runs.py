"""The report is drawn from what runs left, alone or compared, and damage to their files is named."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusionreid.dataloading.records import DataError
from fusionreid.engine.config import load_config
from fusionreid.engine.report import main as report
from fusionreid.engine.reporting.run_record import Result, read_log, read_run
from fusionreid.engine.reporting.runs import differences, draw_report, duration, names_of
from fusionreid.engine.reporting.sections import results_table
from fusionreid.sealed import write_sealed
from tests import ROOT
from tests.runs import arguments

RESULT = {"mAP": 0.5, "mINP": 0.25, "cmc": [0.75, 1.0], "valid_queries": 4}
QUERY = {"kind": "best", "person": "Anna", "camera": "a door", "picture": "AAAA", "average_precision": 1.0}
QUERY |= {"maps": {}, "found": []}
SPLIT = {part: {"images": 1234, "persons": 7, "cameras": 2} for part in ("train", "query", "gallery")}
EVIL = "<script>"


def leave(folder: Path, mean: float, layers: int, epochs: int = 2) -> Path:
    folder.mkdir(parents=True)
    results = {"FusionReID": RESULT | {"mAP": mean}, EVIL: RESULT}
    write_sealed(folder / "metrics.json", {"data": EVIL, "split": SPLIT, "results": results})
    write_sealed(folder / "manifest.json", {"config": {"MODEL": {"HTM_LAYER": layers, "MIX_DIM": 768}}})
    lines = [{"epoch": i + 1, "loss": loss} for i, loss in enumerate([8.0, None, 4.0][: epochs + 1])]
    lines += [{"epoch": epoch, "step": 9, "eval/mAP": mean / 2, "eval/rank1": 0.5} for epoch in range(epochs)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_report_is_drawn_again_without_a_model(tmp_path: Path) -> None:
    run = leave(tmp_path / "run", 0.625, 2)
    (run / "queries.json").write_text(json.dumps({"measure": "cosine", "queries": [QUERY]}))
    assert report(arguments(tmp_path, run)) == 0
    page = (run / "report.html").read_text()
    for shown in (
        "FusionReID</th>",
        "62.5",
        "1,234",
        "&lt;script&gt;",
        "Training loss",
        "HTM_LAYER",
        "worst queries",
        "a door",
    ):
        assert shown in page, shown
    assert EVIL not in page
    assert "Settings that differ" not in page
    assert "Grad-CAM" not in page, "there is no such picture"
    assert page.count("<polyline") == 2 + 1 + 2, "two CMC curves, one loss, mAP and Rank-1"


def test_runs_are_compared(tmp_path: Path) -> None:
    one, two = leave(tmp_path / "a" / "log", 0.625, 2), leave(tmp_path / "b" / "log", 0.875, 3, epochs=0)
    assert report([*arguments(tmp_path, one), "--compare", str(two)]) == 0
    page = (one / "report.html").read_text()
    assert '<th scope="row">a/log, FusionReID</th><td>62.5</td>' in page
    assert '<th scope="row">b/log, FusionReID</th><td class="best">87.5</td>' in page
    assert '<th scope="row">MODEL.HTM_LAYER</th><td>2</td><td>3</td>' in page
    assert "MIX_DIM</th>" not in page
    assert page.count("<polyline") == 4 + 1 + 2, "the other run logged one step and no evaluation"


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    script = "import sys, fusionreid.engine.reporting.runs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_a_training_that_goes_on_has_a_report(tmp_path: Path) -> None:
    run = leave(tmp_path / "run", 0.5, 2)
    (run / "metrics.json").unlink()
    (run / "manifest.json").unlink()
    assert report(arguments(tmp_path, run)) == 0
    page = (run / "report.html").read_text()
    assert "not been evaluated yet" in page
    assert page.count("<polyline") == 1 + 2


@pytest.mark.parametrize(
    "lines",
    [
        b'{"epoch": 1, "loss": 0}\n{"epoch": 2, "loss": 0.0}\n',
        b'{"epoch": 0, "loss": 1}\n{"epoch": 0, "loss": -1}\n',
        b'{"epoch": 1, "loss": 3}\n{"epoch": 2, "lo',
        b'{"epoch": 1, "loss": "low"}\n[]\n7\nnull\n"loss"\n\n\xff\xfe\n{"epoch": true, "loss": 2}\n{"loss": {}}\n',
        b'{"epoch": 1e308, "loss": 1e308}\n{"epoch": 5e-324, "loss": 5e-324}\n{"epoch": NaN, "loss": -Infinity}\n',
        b'{"epoch": 1' + b"0" * 5000 + b', "loss": 2}\n' + b"[" * 100_000 + b"\n",
        b'{"epoch": 1, "eval/mAP": "x"}\n{"epoch": 1, "eval/mAP": null}\n{"eval/mAP": 0.5}\n{"epoch": 3, "eval/mAP":1}',
        b"",
    ],
)
def test_no_log_stops_the_report(tmp_path: Path, lines: bytes) -> None:
    run = leave(tmp_path / "run", 0.5, 2)
    (run / "metrics.jsonl").write_bytes(lines)
    draw_report(run, load_config("synthetic/tiny"))
    page = (run / "report.html").read_text()
    assert not re.search(r"\b(nan|inf)\b", page.partition("</nav>")[2].partition("Configuration</h2>")[0])
    assert page.count("<h2") >= 4


def test_damaged_log_lines_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "loss": 2}\n{"epoch": 2, "lo')
    assert [line.loss for line in read_log(path)] == [2]
    assert caplog.messages == [f"{path}: 1 of 2 lines are damaged and left out"]
    caplog.clear()
    path.write_text('{"epoch": 1, "loss": 2}\n\0\0\0\n{"epoch": "x"}\n{"epoch": 3, "loss": 1}\n')
    assert [line.loss for line in read_log(path)] == [2, 1]
    assert caplog.messages == [f"{path}: 2 of 4 lines are damaged and left out"]


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"results": {}},
        {"data": "own", "split": None},
        {"results": {"r": RESULT | {"mAP": None, "mINP": None, "cmc": [None, 1]}}},
        {"results": {"r": RESULT | {"cmc": [1]}}, "unknown": [1]},
    ],
)
def test_an_evaluation_may_lack_results(tmp_path: Path, content: dict[str, Any]) -> None:
    run = leave(tmp_path / "run", 0.5, 2)
    (run / "metrics.json").write_text(json.dumps(content))
    assert report(arguments(tmp_path, run)) == 0
    assert ("not been evaluated yet" in (run / "report.html").read_text()) == (not content.get("results"))


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("metrics.json", "{", "is damaged: Invalid JSON"),
        ("metrics.json", "[]", "is damaged: Input should be an object"),
        ("metrics.json", '{"results": []}', "is damaged: results: Input should be"),
        ("metrics.json", '{"results": {"a": {"mAP": 1}}}', "is damaged: results.a.mINP: Field required"),
        ("metrics.json", json.dumps({"results": {"a": RESULT | {"cmc": []}}}), "is damaged: results.a.cmc: List"),
        ("metrics.json", json.dumps({"results": {"a": RESULT | {"mAP": "1"}}}), "is damaged: results.a.mAP: Input"),
        ("metrics.json", json.dumps({"split": {"train": 3}}), "is damaged: split.train: Input should be"),
        ("queries.json", json.dumps({"queries": [QUERY | {"picture": '"><b>'}]}), "is damaged: queries.0.picture: "),
        ("manifest.json", "{", "is damaged: Invalid JSON"),
        ("manifest.json", '{"config": 3}', "is damaged: config: Input should be"),
        ("manifest.json", "", "is damaged: Invalid JSON"),
    ],
)
def test_a_damaged_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str, named: str
) -> None:
    run = leave(tmp_path / "run", 0.5, 2)
    (run / file).write_text(content)
    assert report(arguments(tmp_path, run)) == 2
    assert f"{run / file} {named}" in capsys.readouterr().err
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["metrics.json", "manifest.json", "queries.json"])
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path, name: str) -> None:
    run, draw, found = leave(tmp_path / "run", 0.625, 2), random.Random(name), 0  # or harmless
    write_sealed(run / "queries.json", {"measure": "cosine", "queries": [QUERY]})
    cfg, whole = load_config(os.devnull, [f"OUTPUT_DIR={run}"]), (run / name).read_bytes()
    draw_report(run, cfg)
    expected = (run / "report.html").read_bytes()
    for bit in draw.sample(range(8 * len(whole)), 150):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (run / name).write_bytes(data)
        try:
            draw_report(run, cfg)
        except DataError as error:
            found += name in str(error)
        else:
            found += (run / "report.html").read_bytes() == expected
    assert found == 150


@pytest.mark.parametrize("name", ["manifest.json", "metrics.jsonl"])
@pytest.mark.parametrize("place", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.name)])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path, name: str, place: Callable[[Path], None]) -> None:
    run = leave(tmp_path / "run", 0.625, 2)
    (run / name).unlink()
    place(run / name)
    with pytest.raises(DataError, match=rf"{name} is damaged: .*not? "):
        read_run(run, "run")


def test_the_command_tells_what_it_has_nothing_to_show_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = leave(tmp_path / "run", 0.625, 2), leave(tmp_path / "other", 0.5, 2)
    (run / "metrics.jsonl").unlink()
    (other / "metrics.json").unlink()
    assert report([*arguments(tmp_path, run), "--compare", str(other)]) == 0
    told = capsys.readouterr().err
    assert "run has no metrics.jsonl: the report shows no training curves of it" in told
    assert "other has no metrics.json: the report shows no results of it" in told


def test_a_training_without_its_manifest_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = leave(tmp_path / "run", 0.625, 2)
    (run / "manifest.json").unlink()
    assert read_run(run, "run").settings == {}
    assert caplog.messages == [f"{run / 'manifest.json'} is missing: the settings of this training are not known"]


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = leave(tmp_path / "run", 0.5, 2)
    assert report([*arguments(tmp_path, run), "--compare", str(tmp_path / "none")]) == 2
    message = f"{tmp_path / 'none'} holds neither metrics.json nor metrics.jsonl: train or evaluate that run first"
    assert message in capsys.readouterr().err


def test_best_values_are_bold_where_there_are_others() -> None:
    one = Result.model_validate(RESULT | {"mINP": None})
    assert not any(cell.best for row in results_table({"a": one}).rows for cell in row)
    two = Result.model_validate(RESULT | {"mAP": 0.8125, "mINP": None, "cmc": [0.5]})
    rows = results_table({"a": one, "b": two}).rows
    assert [[cell.text for cell in row] for row in rows] == [
        ["a", "50.0", "n/a", "75.0", "100.0", "100.0", "n/a", "4", "0"],
        ["b", "81.2", "n/a", "50.0", "50.0", "50.0", "n/a", "4", "0"],
    ]
    assert [[cell.best for cell in row] for row in rows] == [
        [False, False, False, True, True, True, False, False, False],
        [False, True, False, False, False, False, False, False, False],
    ]


def test_the_duration_leaves_out_the_pauses_between_starts(tmp_path: Path) -> None:
    run = leave(tmp_path / "run", 0.5, 2)
    seconds = [10, 60, None, 70, 5, 3600]  # the second start begins at 5
    lines = [{"epoch": 1, "loss": 1, "seconds": value} for value in seconds]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    draw_report(run, load_config("synthetic/tiny"))
    assert "<dd>1 epoch in 1 h 1 min</dd>" in (run / "report.html").read_text()
    texts = [duration(seconds) for seconds in (0.2, 59, 61, 7300, 200_000)]
    assert texts == ["0 s", "59 s", "1 min 1 s", "2 h 1 min", "2 d 7 h"]


def test_names_tell_folders_apart() -> None:
    assert names_of([Path("/x/a/log"), Path("/x/b/log")]) == ["a/log", "b/log"]
    assert names_of([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert len(names_of([Path("/x/a"), Path("/x/a")])) == 2
    assert names_of([Path("/")]) == ["/"]


def test_settings_that_one_run_lacks_differ() -> None:
    settings = [{"A": 1, "B": 2, "OUTPUT_DIR": "x"}, {"A": 1, "C": [3], "OUTPUT_DIR": "y"}]
    assert differences(settings) == [["B", "2", ""], ["C", "", "[3]"]]
