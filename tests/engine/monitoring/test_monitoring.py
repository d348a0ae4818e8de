"""One run by its command: what its console, its log, its folder say about it."""

import json
import re
from pathlib import Path

import pytest

from fusionreid.engine.train import main as train
from tests.runs import arguments


def test_what_a_run_says_about_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"SOLVER__MAX_EPOCHS": 4, "SOLVER__EVAL_PERIOD": 4, "SOLVER__PROFILE": 1, "SOLVER__LOGGERS": "no"}
    assert train(arguments(tmp_path, tmp_path / "out", **keys)) == 0
    out = capsys.readouterr().out
    seconds = r"\d+\.\d s"
    laps = ", ".join(f"{seconds} {name}" for name in ("imports", "data set", "model", "resuming", "images", "logs"))
    assert len(re.findall(rf"^first step after {seconds}: {laps}, {seconds} step$", out, re.MULTILINE)) == 1
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert "eval/mAP" in lines.pop()
    for line in lines:
        assert (len(line["identity"]), len(line["triplet"])) == (6, 6)  # heads
        assert line["gradient_norm"] > 0
        assert line["images_per_s"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert 0.1 < line["peak_gib"] < 100
        assert "mfu" not in line  # of another model, on a CPU
    assert re.fullmatch(rf"{len(lines)} steps in 0:\d\d:\d\d, [\d.]+ images/s in training, peak [\d.]+ GiB",
                        out.splitlines()[-1])  # fmt: skip
    assert "gradient_norm " in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "checkpoints", "embeddings", "exit.json", ".lock", "log.txt", "manifest.json", "metrics.json", "metrics.jsonl",
        "profile-11-11.json.gz", "queries.json", "report.html"
    }  # fmt: skip
