"""A search that cannot be, or means little, says so."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusionreid import Embedder
from fusionreid.dataloading import Record
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.evaluation.names import Names
from fusionreid.engine.search import main as search
from tests import ROOT
from tests.runs import untrained


@pytest.mark.parametrize(("argument", "text"), [
    ("--top=0", "--top: must be 1 or more"), ("--at-least=1.5", "must be a cosine"), ("--at-least=nan", "a cosine"),
    ("--picture=found.pdf", "found.pdf must end in .html, .htm, .png, .jpg or .jpeg"),
    ("--picture=nowhere/a.png", "--picture: nowhere/a.png cannot be written"),
    ("--json=nowhere/found.json", "--json: nowhere/found.json cannot be written"),
])  # fmt: skip
def test_a_search_says_what_is_wrong_before_it_embeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], argument: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fusionreid.engine.search_sources.read_source", None)
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


def test_a_run_without_vectors_says_which_command_stores_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "queries.png").write_bytes(b"")  # no image of anybody
    assert search(["--query", str(run), "--gallery", str(run)]) == 2
    assert f"{run} is a run without stored vectors" in (said := capsys.readouterr().err)
    assert f"evaluate --config_file FILE OUTPUT_DIR {run}," in said
    (run / "config.yml").touch()
    assert search(["--query", str(run), "--gallery", str(run)]) == 2
    assert f"evaluate --config_file {run}/config.yml," in capsys.readouterr().err


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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with seven crops beside it, two tracks of the same person among them."""
    folder = untrained(tmp_path_factory.mktemp("search") / "run", ("hall", "back door"))
    lines = ["Track;Image;pid;cam", *(f"{i // 3};crops/{path.name};{'Zoë'};{'hall' if i < 6 else 'yard'}"
                                      for i, path in enumerate(crops_of(folder)))]  # fmt: skip
    (folder.parent / "tracks.csv").write_text("\n".join(lines), "utf-8")
    return folder


def crops_of(run: Path) -> list[Path]:
    return sorted((run.parent / "crops").iterdir())


def found_by(run: Path, output: Path, *argv: str) -> list[dict[str, Any]]:
    settings = ["--config_file", str(run / "config.yml"), "TEST.IMS_PER_BATCH=7"]
    assert search([*argv, "--json", str(output / "found.json"), *settings]) == 0
    return json.loads((output / "found.json").read_text())


def test_a_track_is_the_mean_of_its_unit_vectors_by_list_and_by_folder(run: Path, tmp_path: Path) -> None:
    files, vectors = crops_of(run), Embedder(run)(crops_of(run)).astype(np.float64)
    means = np.stack([vectors[part].mean(0) for part in (slice(0, 3), slice(3, 6), slice(6, 7))])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    for i, file in enumerate(files):
        (tmp_path / "folders" / str(i // 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / str(i // 3) / file.name).symlink_to(file)
    for source in (run.parent / "tracks.csv", tmp_path / "folders"):
        found = found_by(run, tmp_path, "--query", str(files[4]), "--gallery", str(source), "--tracks")
        (line,) = found
        assert [(Path(match["track"]).name, match["images"]) for match in line["matches"]] in (
            [("1", 3), ("0", 3), ("2", 1)], [("1", 3), ("2", 1), ("0", 3)])  # fmt: skip
        for match in line["matches"]:
            expected = means[int(Path(match["track"]).name)] @ vectors[4]
            assert match["cosine"] == pytest.approx(expected, abs=1e-5)
        assert Path(line["matches"][0]["path"]).name in {file.name for file in files[3:6]}  # to be shown
    assert (
        found_by(run, tmp_path, "--query", str(files[0].parent), "--gallery", str(files[0]), "--tracks")[0]["images"]
        == 7
    )


def test_a_list_names_persons_and_cameras_which_may_be_chosen(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed, first = str(run.parent / "tracks.csv"), str(crops_of(run)[0])
    ask = ["--query", first, "--gallery", listed]
    matches = found_by(run, tmp_path, *ask)[0]["matches"]
    assert [match["person"] for match in matches] == ["Zoë"] * 7
    assert sorted(match["camera"] for match in matches) == ["hall"] * 6 + ["yard"]
    assert "tracks" not in capsys.readouterr().out
    assert [m["camera"] for m in found_by(run, tmp_path, *ask, "--camera=yard")[0]["matches"]] == ["yard"]
    assert len(found_by(run, tmp_path, *ask, "--camera", "Yard", "--camera", "hall")[0]["matches"]) == 7
    tracks = found_by(run, tmp_path, *ask, "--tracks", "--camera", "hall")[0]["matches"]
    assert {(match["track"], match["camera"]) for match in tracks} == {("0", "hall"), ("1", "hall")}
    settings = ["--config_file", str(run / "config.yml")]
    for gallery, camera, text in ((listed, "garden", "the cameras hall, yard"), (first, "hall", "does not say which")):
        assert search(["--query", first, "--gallery", gallery, "--camera", camera, *settings]) == 2
        assert text in capsys.readouterr().err


def test_a_list_without_tracks_or_with_two_for_one_image_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--config_file", str(run / "config.yml"), "--tracks", "--gallery", str(run.parent / "crops")]
    file = crops_of(run)[0]
    for text, expected in {
        f"path\n{file}\n": "1 of 1 images have no track", f"path,track\n{file},1\n{file},2\n": "two tracks, 1 and 2",
        "file;track\n;3\n": "line 2: path must not be empty", "a,b\n": "no column path",
        "path,track\n": "lists no images",
    }.items():  # fmt: skip
        (tmp_path / "list.csv").write_text(text)
        assert search(["--query", str(tmp_path / "list.csv"), *settings]) == 2
        assert expected in capsys.readouterr().err


def test_stored_names_come_back_and_their_threshold_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tuple(Record(f"{name}.jpg", person, camera) for name, person, camera in (("a", 1, 0), ("b", 2, 1)))
    made = {"checkpoint": "weights", "TEST": {"FEAT": 0}}
    names = Names({1: "anna", 2: "0031"}, {0: "hall", 1: "2 <b>"}).as_source()
    embeddings.save(tmp_path / "run/embeddings", torch.eye(2, 3), records, 0, {**made, **names})
    points = [{"false_positive_rate": 10.0**-i, "true_positive_rate": 0.5, "cosine": 0.1 * i} for i in (2, 3)]
    (tmp_path / "run/metrics.json").write_text(json.dumps({**made, "thresholds": points}))
    page = tmp_path / "found.html"
    argv = ["--query", str(tmp_path / "run"), "--gallery", str(tmp_path / "run"), "--picture", str(page)]
    assert search(argv) == 0
    told = capsys.readouterr()
    assert "a.jpg  anna, hall" in told.out
    assert "cosine 0.300: in the evaluation" in told.err
    assert (
        "cosine 0.300: in the evaluation, 50 % of the pairs of one person reach it, and 1 in 1,000" in page.read_text()
    )
    assert search([*argv, "--at-least", "0.4"]) == 0
    assert "cosine 0.400, as asked for" in page.read_text()
    for other in ({**made, "checkpoint": "others"}, {**made, "TEST": {"FEAT": 1}}, {**made, "thresholds": [1]}, []):
        text = json.dumps({"thresholds": points, **other} if other else other)
        (tmp_path / "run/metrics.json").write_text(text)
        assert search(argv) == 0
        assert 'role="separator"' not in page.read_text()
        assert "which cosine means the same person is not known" in capsys.readouterr().err
    (tmp_path / "run/metrics.json").unlink()
    os.mkfifo(tmp_path / "run/metrics.json")  # is not waited for
    assert search(argv) == 0
    (tmp_path / "run/metrics.json").unlink()
    (tmp_path / "run/metrics.json").write_bytes(b"[" * 100_000)
    assert search(argv) == 0
    assert "metrics.json tells no threshold: it is nested too deeply" in capsys.readouterr().err
    embeddings.save(tmp_path / "old/embeddings", torch.eye(2, 3), records, 0, made)  # before names were kept
    assert search(["--query", str(tmp_path / "old"), "--gallery", str(tmp_path / "old")]) == 0
    assert "b.jpg  2, 2\n" in capsys.readouterr().out
