"""A search that cannot be, or means little, says so."""

from pathlib import Path

import pytest
import torch

from fusionreid.dataloading import Record
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.search import main as search


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
