"""The rendered data set: a pure function of its parameters, whole on disk, in the Market-1501 layout."""

import errno
import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusionreid.dataloading import read_split
from fusionreid.dataloading.config import DatasetsConfig, SyntheticConfig
from fusionreid.dataloading.datasets import market1501
from fusionreid.dataloading.datasets.synthetic import PARAMETERS, camera, person, render_dataset, render_person
from fusionreid.dataloading.datasets.synthetic.__main__ import main
from fusionreid.dataloading.records import DataError
from fusionreid.errors import StorageError

SMALL = {"persons": 3, "test_persons": 4, "cameras": 3, "images": 3, "seed": 5, "size": (64, 32)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_dataset(tmp_path_factory.mktemp("made") / "synthetic", **SMALL)


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_arguments_same_bytes_in_another_process(root: Path, tmp_path: Path) -> None:
    arguments = ["--persons=3", "--test-persons=4", "--cameras=3", "--images=3", "--seed=5", "--size", "64", "32"]
    subprocess.run(
        [sys.executable, "-m", "fusionreid.dataloading.datasets.synthetic", "--root", tmp_path / "again", *arguments],
        check=True,
    )
    assert digests(tmp_path / "again") == digests(root)


def test_a_picture_depends_on_every_argument_and_on_no_other_picture() -> None:
    first = render_person(0, 1, 0, 0)
    assert first.shape == (128, 64, 3)
    assert first.dtype == np.uint8
    for other in ((1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1)):
        assert np.abs(render_person(*other).astype(int) - first).mean() > 5
    person.person_of.cache_clear()
    camera.camera_of.cache_clear()
    assert np.array_equal(render_person(0, 1, 0, 0), first)


@pytest.mark.parametrize("size", [(256, 128), (33, 50), (16, 16)])
def test_any_size(size: tuple[int, int]) -> None:
    pictures = [render_person(3, who, 1, 0, size) for who in range(20)]
    assert all(picture.shape == (*size, 3) and picture.std() > 5 for picture in pictures)


def test_market_reader_finds_what_was_asked_for(root: Path) -> None:
    split = market1501.read_layout(root, "synthetic")
    assert split.persons == (1, 2, 3)
    assert Counter((r.person, r.camera) for r in split.train) == {(p, c): 3 for p in (1, 2, 3) for c in range(3)}
    assert Counter((r.person, r.camera) for r in split.query) == {(p, c): 1 for p in range(4, 8) for c in range(3)}
    matches = Counter((r.person, r.camera) for r in split.gallery if r.person)
    assert matches == {(p, c): 2 for p in range(4, 8) for c in range(3)}
    assert sum(r.person == 0 for r in split.gallery) == 4
    for record in (*split.train, *split.query, *split.gallery):
        with Image.open(record.path) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (32, 64), "RGB")


def test_read_renders_once(tmp_path: Path) -> None:
    made = SyntheticConfig(PERSONS=2, TEST_PERSONS=2, CAMERAS=2, IMAGES=2, SIZE=(32, 16))
    cfg = DatasetsConfig(NAMES="synthetic", ROOT_DIR=str(tmp_path / "data"), SYNTHETIC=made)
    split = read_split(cfg)
    written = [Path(r.path).stat().st_mtime_ns for r in split.train]
    again = read_split(cfg)
    assert [Path(r.path).stat().st_mtime_ns for r in again.train] == written
    assert not {r.person for r in split.train} & {r.person for r in (*split.query, *split.gallery)}


def test_other_contents_are_left_alone(root: Path, tmp_path: Path) -> None:
    before = digests(root)
    with pytest.raises(DataError, match=r"holds .*'seed': 5.* remove that folder or choose another DATASETS.ROOT_DIR"):
        render_dataset(root, **{**SMALL, "seed": 6})
    assert digests(root) == before
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match="files of other origin"):
        render_dataset(tmp_path, **SMALL)
    for content in ("[" * 100_000, f'["{"x" * 10_000}"]'):
        (tmp_path / "synthetic.json").write_text(content)
        with pytest.raises(DataError, match=r"going by its synthetic\.json") as caught:
            render_dataset(tmp_path, **SMALL)
        assert len(str(caught.value)) < 1000
    (tmp_path / "synthetic.json").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int, who: int, *_: object) -> np.ndarray:
        if who == 5:
            raise OSError("disk full")
        return np.zeros((64, 32, 3), np.uint8)

    monkeypatch.setattr("fusionreid.dataloading.datasets.synthetic.render_person", fail)
    with pytest.raises(OSError, match="disk full"):
        render_dataset(tmp_path / "data" / "synthetic", **SMALL)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".synthetic.lock"]


def test_what_a_killed_process_left_is_removed(root: Path, tmp_path: Path) -> None:
    code = (
        "import os; from fusionreid.dataloading.datasets import synthetic; "
        "synthetic.render_person = lambda *_: os.kill(os.getpid(), 9); "
        f"synthetic.render_dataset({str(tmp_path / 'synthetic')!r}, **{SMALL!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.glob(".synthetic-*"))) == 1
    render_dataset(tmp_path / "synthetic", **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".synthetic.lock", "synthetic"]
    assert digests(tmp_path / "synthetic") == digests(root)


def test_processes_that_race_end_with_one_whole_folder(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from fusionreid.dataloading.datasets.synthetic import render_dataset; sys.stdin.readline(); "
        f"render_dataset({str(tmp_path / 'synthetic')!r}, **{SMALL!r})"
    )
    racers = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) for _ in range(3)]
    for racer in racers:
        assert racer.stdin
        racer.stdin.write(b"go\n")
        racer.stdin.close()
    assert [racer.wait(60) for racer in racers] == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".synthetic.lock", "synthetic"]
    assert digests(tmp_path / "synthetic") == digests(root)
    assert (tmp_path / "synthetic").stat().st_mode & 0o055 == 0o055, "others may read it"


def test_look_alikes_wear_the_same_colours_and_differ_otherwise() -> None:
    clothes = [person.TOP, person.BOTTOM, person.SHOES]
    group = [person.person_of(0, who) for who in range(4, 8)]
    assert all(np.array_equal(p.materials[clothes, :3], group[0].materials[clothes, :3]) for p in group)
    assert len({(p.height, p.girth) for p in group}) == 4
    assert len({(p.hair, p.hat, p.sleeves, p.lower, p.bag, int(p.materials[person.TOP, 6])) for p in group}) == 4
    others = [person.person_of(0, who).materials[clothes, :3].tobytes() for who in range(8, 12)]
    assert len(set(others)) == 4


def test_wrong_counts_and_the_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path / "a"), "--images", "1"]) == 2
    assert "IMAGES at least 2" in capsys.readouterr().err
    small = ["--persons=1", "--test-persons=2", "--images=2", "--size", "32", "16"]
    assert main(["--root", str(tmp_path / "a"), *small]) == 0
    assert "25 images" in capsys.readouterr().out
    assert (tmp_path / "a" / PARAMETERS).is_file()


@pytest.mark.parametrize(("code", "exit_code", "remedy"), [
    (errno.ENOSPC, 4, "make room or set another one"), (None, 4, "make room or set another one"),
    (errno.EROFS, 2, "set another one"),
])  # fmt: skip
def test_a_disk_that_does_not_take_it_names_the_key(
    tmp_path: Path, monkeypatch, code: int, exit_code: int, remedy: str
) -> None:
    def save(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code)) if code else OSError("encoder error -2 when writing image file")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises((DataError, StorageError), match=rf"DATASETS\.ROOT_DIR {tmp_path} .*{remedy}") as caught:
        read_split(DatasetsConfig(NAMES="synthetic", ROOT_DIR=str(tmp_path)))
    assert caught.value.exit_code == exit_code
    assert {path.name for path in tmp_path.iterdir()} <= {".synthetic.lock"}
