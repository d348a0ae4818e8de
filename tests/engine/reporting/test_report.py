"""The report of a run on own data: written by training and evaluation, equal to metrics.json, names as written."""

import errno
import json
import os
from html import escape
from pathlib import Path

import pytest

from fusionreid.engine.evaluate import main as evaluate
from fusionreid.engine.evaluation.names import cosine_text
from fusionreid.engine.train import main as train
from tests.engine.reporting.own import CAMERAS, PERSONS, Run
from tests.engine.reporting.pages import Page, page_of


def test_training_leaves_a_report_at_each_evaluation(run: Run) -> None:
    page = page_of(run.trained)
    assert page.title == "shop: FusionReID report"
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "eval/mAP" in line]
    assert len(scores) == 2
    shown = page.section("mAP and Rank-1 by epoch, %")
    values = [(score["epoch"], 100 * score["eval/mAP"], 100 * score["eval/rank1"]) for score in scores]
    assert shown.rows == [[f"{value:.4g}" for value in row] for row in values]
    facts = dict(page.facts)
    assert facts.keys() == {"Data", "Training", "Checkpoint", "Evaluated", "Device"}
    steps = max(line["step"] for line in lines)
    assert facts["Checkpoint"] == f"step-{steps:08}"
    assert facts["Training"].startswith("2 epochs in ")
    assert page.section("Results").rows[0][1] == f"{100 * scores[-1]['eval/mAP']:.1f}"
    assert "Grad-CAM" not in run.trained, "maps take a pass of the model, which only evaluate makes"


def test_numbers_equal_metrics(evaluated: Run) -> None:
    metrics = json.loads((evaluated.output / "metrics.json").read_text())
    page = page_of((evaluated.output / "report.html").read_text(encoding="utf-8"))
    rows = {row[0]: row[1:] for row in page.section("Results").rows}
    assert rows.keys() == metrics["results"].keys() == {"FusionReID", "re-ranked"}
    for name, result in metrics["results"].items():
        rates = [result["mAP"], result["mINP"], *(result["cmc"][k - 1] for k in (1, 5, 10))]
        low, high = (f"{100 * limit:.1f}" for limit in result["interval_95"]["mAP"])
        counts = [str(result[key]) for key in ("valid_queries", "unmatched_queries")]
        assert rows[name] == [*(f"{100 * rate:.1f}" for rate in rates), f"{low} to {high}", *counts]
    first = metrics["results"]["FusionReID"]
    figures = dict(page.section("Results").figures)
    for name, rate in (("mAP", first["mAP"]), ("Rank-1", first["cmc"][0]), ("mINP", first["mINP"])):
        low, high = (f"{100 * limit:.1f}" for limit in first["interval_95"][name])
        assert figures[name] == f"{100 * rate:.1f} %95 % interval {low} to {high}"
    assert figures["Queries"] == f"{first['valid_queries']}all with a match"
    cmc = page.section("CMC, %").rows
    assert [row[1] for row in cmc] == [f"{100 * rate:.4g}" for rate in first["cmc"][:20]]
    heat = page.section("mAP by camera pair, %")
    for pair in metrics["camera_pairs"]:
        row = next(row for row in heat.rows if row[0] == pair["query"])
        assert row[heat.head.index(pair["gallery"])] == f"{100 * pair['mAP']:.1f}{pair['num_valid']}"
    assert {pair["query"] for pair in metrics["camera_pairs"]} == set(CAMERAS)
    points = [row[:2] for row in page.section("Threshold and ROC, %").rows if row[0].startswith("cosine")]
    assert points == [
        [f"cosine ≥ {cosine_text(p['cosine'])}", f"{100 * p['true_positive_rate']:.1f}"] for p in metrics["thresholds"]
    ]
    confused = [[c["person"], c["taken_for"], f"{c['queries']} of {c['of']}"] for c in metrics["confusions"]]
    assert page.section("Most confused persons").rows == confused


def test_persons_and_cameras_have_the_names_their_owner_wrote(evaluated: Run) -> None:
    shown = json.loads((evaluated.output / "queries.json").read_text())["queries"]
    everybody = [one for query in shown for one in (query, *query["found"])]
    assert {one["person"] for one in everybody} <= set(PERSONS[4:])
    assert {one["camera"] for one in everybody} == set(CAMERAS)
    page = page_of((evaluated.output / "report.html").read_text(encoding="utf-8"))
    for query in shown:
        assert f"{escape(query['person'])} by camera {query['camera']}, AP" in page.text
    metrics = json.loads((evaluated.output / "metrics.json").read_text())
    assert {one[key] for one in metrics["confusions"] for key in ("person", "taken_for")} <= set(PERSONS[4:])


def test_a_full_disk_costs_the_report_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "queries.json")

    monkeypatch.setattr("fusionreid.engine.reporting.summary.describe_queries", full)
    assert train([*run.argv, f"OUTPUT_DIR={tmp_path}", "SOLVER.MAX_EPOCHS=1"]) == 0
    assert "report or vectors were not written" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_results_of_other_embeddings_have_no_pictures(evaluated: Run, tmp_path: Path) -> None:
    """Of an earlier evaluation in the same folder."""
    (tmp_path / "queries.json").write_text("{}")
    stored = f"TEST.EMBEDDINGS={evaluated.output / 'embeddings'}"
    assert evaluate([*evaluated.argv, stored, f"OUTPUT_DIR={tmp_path}"]) == 0
    assert not (tmp_path / "queries.json").exists()
    assert isinstance(page_of(evaluated.trained), Page)
