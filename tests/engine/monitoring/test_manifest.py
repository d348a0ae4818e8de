"""The manifest says what a run was made from, and a start that goes on says what has changed."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusionreid.dataloading import Split, read_split
from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.engine.config import Config
from fusionreid.engine.monitoring import manifest
from fusionreid.engine.monitoring.manifest import commit, describe_data, record
from fusionreid.engine.train import main as train
from tests.runs import arguments

CPU = torch.device("cpu")


@pytest.fixture
def split(tmp_path: Path) -> Split:
    sizes = {"PERSONS": 3, "TEST_PERSONS": 2, "CAMERAS": 2, "IMAGES": 2, "SIZE": [32, 16]}
    return read_split(DatasetsConfig(NAMES="synthetic", ROOT_DIR=str(tmp_path / "data"),
                                     SYNTHETIC={**sizes, "SIZE": (32, 16)}))  # fmt: skip


def read(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_everything_a_run_was_made_from(tmp_path: Path, split: Split) -> None:
    cfg = Config.from_dict({"SOLVER": {"BASE_LR": 0.01, "PRECISION": "fp32"}})
    run, note = record(tmp_path, cfg, split, CPU, ranks=2, step=0)
    assert note == ""
    found = read(tmp_path)
    assert found.keys() == {"run", "started", "step", "commit", "versions", "precision", "device", "ranks", "data",
                            "numerics", "config", "earlier", "blake2b"}  # fmt: skip
    assert (found["run"], found["ranks"], found["precision"], found["earlier"]) == (run, 2, "fp32", [])
    assert Config.from_dict(found["config"]) == cfg
    assert found["versions"]["torch"] == torch.__version__
    assert found["data"]["train"] == {"images": 12, "persons": 3, "cameras": 2}
    assert found["data"]["edition"] is None


def test_a_start_that_goes_on_says_what_has_changed_and_keeps_what_was(tmp_path: Path, split: Split) -> None:
    first, second = (Config.from_dict({"SOLVER": {"LOG_PERIOD": period}}) for period in (100, 7))
    run, _ = record(tmp_path, first, split, CPU, ranks=2, step=0)
    started = read(tmp_path)["started"]
    assert record(tmp_path, first, split, CPU, ranks=2, step=9) == (run, "")
    text = "differs from the start before: ranks 2 -> 1, config.SOLVER.LOG_PERIOD 100 -> 7"
    assert record(tmp_path, second, split, CPU, ranks=1, step=30) == (run, text)
    found = read(tmp_path)
    assert (found["step"], found["ranks"], found["config"]["SOLVER"]["LOG_PERIOD"]) == (30, 1, 7)
    assert [(start["step"], start["differed"]) for start in found["earlier"]] == [
        (0, {}), (9, {"ranks": 2, "config.SOLVER.LOG_PERIOD": 100})
    ]  # fmt: skip
    assert found["earlier"][0]["started"] == started
    again, note = record(tmp_path, second, split, CPU, ranks=1, step=0)  # from the beginning: another run
    assert (again != run, note, read(tmp_path)["earlier"]) == (True, "", [])


def test_many_differences_are_one_line(tmp_path: Path, split: Split) -> None:
    record(tmp_path, Config(), split, CPU, ranks=1, step=0)
    path = tmp_path / "manifest.json"
    old = read(tmp_path)
    del old["blake2b"]
    path.write_text(json.dumps(old | {"versions": {f"package {i}": "1" for i in range(20)}}))
    note = record(tmp_path, Config(), split, CPU, ranks=1, step=1).note
    assert "\n" not in note
    assert note.count("->") == manifest.SHOWN
    installed = sum(version is not None for version in old["versions"].values())
    assert note.endswith(f" and {20 + installed - manifest.SHOWN} more")


def test_the_digest_follows_names_sizes_persons_and_cameras_but_not_the_folder(tmp_path: Path, split: Split) -> None:
    digest = describe_data(split)["digest"]
    moved = Path(split.root).rename(tmp_path / "elsewhere")

    def at(place: Path, **changes: object) -> Split:
        parts = {part: tuple(replace(r, path=r.path.replace(split.root, str(place)))
                             for r in getattr(split, part)) for part in ("train", "query", "gallery")}  # fmt: skip
        return replace(split, root=str(place), **parts | changes)

    same = at(moved)
    assert describe_data(same)["digest"] == digest
    first, *rest = same.train
    for other in (replace(first, person=first.person + 50), replace(first, camera=first.camera + 1)):
        assert describe_data(at(moved, train=(other, *rest)))["digest"] != digest
    with open(first.path, "ab") as file:
        file.write(b"\0")
    changed = describe_data(same)["digest"]
    assert changed != digest
    Path(first.path).unlink()
    assert describe_data(same)["digest"] not in (digest, changed)


@pytest.mark.parametrize(("note", "edition"), [
    ("MSMT17 V1, train + val", "V1"), ("MSMT17 V2, train + val; 3 bad image files passed over", "V2"),
    ("MSMT17 in the Market-1501 layout, V1 or V2 unknown", None), ("", None),
])  # fmt: skip
def test_the_edition_of_msmt17(split: Split, note: str, edition: str | None) -> None:
    assert describe_data(replace(split, note=note))["edition"] == edition


@pytest.mark.parametrize("text", ["{", "[1]", "\0"])
def test_a_damaged_manifest_is_written_anew(tmp_path: Path, split: Split, caplog, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert record(tmp_path, Config(), split, CPU, ranks=1, step=5).note == ""
    assert read(tmp_path)["step"] == 5
    assert "cannot be read" in caplog.text


def test_a_full_disk_costs_the_manifest_alone(tmp_path: Path, split: Split, caplog, full_disk: None) -> None:
    record(tmp_path, Config(), split, CPU, ranks=1, step=0)
    assert "was not written: [Errno 28]" in caplog.text


def test_the_commit_is_that_of_the_source_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "ROOT", tmp_path / "source")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_text("1")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C"]
    for command in (["init", "-q"], ["add", "source"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, str(tmp_path), *command], check=True)
    assert commit() is None  # a folder in somebody else's repository
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    head = subprocess.run([*git, str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert commit() == head.stdout.strip()
    (tmp_path / "source/file").write_text("2")
    assert commit() == f"{head.stdout.strip()}-dirty"


def test_a_resumed_training_says_what_has_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"SOLVER__MAX_EPOCHS": 1, "SOLVER__WARMUP_ITERS": 0}
    assert train(arguments(tmp_path, tmp_path / "out", **keys)) == 0
    assert "differs from" not in capsys.readouterr().out
    assert train(arguments(tmp_path, tmp_path / "out", **keys, SOLVER__LOG_PERIOD=5)) == 0
    assert "differs from the start before: config.SOLVER.LOG_PERIOD 1 -> 5\n" in capsys.readouterr().out
