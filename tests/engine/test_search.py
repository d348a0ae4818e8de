"""A search that cannot be, or means little, says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusionreid.dataloading import Record
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.search import main as search
from tests import ROOT


@pytest.mark.parametrize(("argument", "text"), [
    ("--top=0", "--top: must be 1 or more"), ("--at-least=1.5", "must be a cosine"), ("--at-least=nan", "a cosine"),
    ("--json=nowhere/found.json", "--json: nowhere/found.json cannot be written"),
])  # fmt: skip
def test_a_search_says_what_is_wrong_before_it_embeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], argument: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fusionreid.engine.search._load_or_embed", None)
    with pytest.raises(SystemExit, match="2"):
        search(["--query", "q", "--gallery", "g", argument])
    assert text in capfd.readouterr().err


def test_features_of_two_models_are_not_compared_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = Record("a.jpg", -1, -1), Record("b.jpg", -1, -1)
    for name, source in {"one": {"checkpoint": "a", "TEST": {"FEAT": 0}},
                         "two": {"checkpoint": "a", "TEST": {"FEAT": 1}}}.items():  # fmt: skip
        embeddings.save(tmp_path / name, torch.eye(2, 3), records, 0, source)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert search(["--query", one, "--gallery", one]) == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert search(["--query", one, "--gallery", two]) == 0
    assert "their cosines mean little: TEST.FEAT 0 and 1" in caplog.text


def test_a_run_stands_for_its_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Record("a.jpg", -1, -1), Record("b.jpg", -1, -1)
    embeddings.save(tmp_path / "run/embeddings", torch.eye(2, 3), records, 0, {})
    (tmp_path / "run/ranks.png").write_bytes(b"")  # no image of anybody
    assert search(["--query", str(tmp_path / "run"), "--gallery", str(tmp_path / "run/embeddings")]) == 0
    assert capsys.readouterr().out.count("a.jpg") == 3
    assert embeddings.folder_at(tmp_path / "run") == tmp_path / "run/embeddings"
    assert embeddings.folder_at(tmp_path) == tmp_path


def test_a_search_of_stored_vectors_and_a_report_load_nothing_that_only_a_model_needs(tmp_path: Path) -> None:
    records = Record("a.jpg", -1, -1), Record("b.jpg", -1, -1)
    embeddings.save(tmp_path / "one", torch.eye(2, 3), records, 0, {})
    result = {"mAP": 0.5, "mINP": 0.5, "cmc": [0.5, 1.0], "valid_queries": 2}
    (tmp_path / "metrics.json").write_text(json.dumps({"data": "own", "results": {"FusionReID": result}}))
    (tmp_path / "run.yml").write_text("")
    one = str(tmp_path / "one")
    report = ["--config_file", f"{tmp_path}/run.yml", "OUTPUT_DIR", str(tmp_path)]
    for command, argv, absent in (
        ("search", ["--query", one, "--gallery", one], {"torchvision", "timm", "torch._dynamo"}),
        ("report", report, {"torch", "torchvision", "timm", "triton"}),
    ):
        script = f"import sys; from fusionreid.engine.cli import main; code = main({[command, *argv]}); "
        script += f"sys.exit(code or ', '.join({absent} & set(sys.modules)) or 0)"
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_control_character_in_a_name_is_never_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    embeddings.save(tmp_path / "one", torch.eye(2, 3), (Record("a.jpg", -1, -1), Record("b.jpg", -1, -1)), 0, {})
    found = [{"query": "\x1b[31m.jpg", "matches": [{"path": "\x1b]0;x\x07.jpg", "cosine": 0.5}]}]
    monkeypatch.setattr("fusionreid.engine.search.nearest", lambda *_: found)
    one = str(tmp_path / "one")
    assert search(["--query", one, "--gallery", one]) == 0
    assert "\x1b" not in (out := capfd.readouterr().out)
    assert r"\x1b[31m.jpg" in out
