"""Every reader on made-up folders: the recorded ones, other systems' layouts, and what goes wrong in practice."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from fusionreid.dataloading import DataError, read_split
from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets.market1501 import COUNTS, compare
from fusionreid.dataloading.records import Record, Split
from tests.numerics import FIXTURES

RECORDED = json.loads((FIXTURES / "modules/readers.json").read_text())
MSMT17_FOLDERS = {"train": "train", "val": "train", "query": "test", "gallery": "test"}


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def read(name: str, root: Path) -> Split:
    return read_split(DatasetsConfig(NAMES=name, ROOT_DIR=str(root)))


def write(
    name: str, root: Path, suffix: str = ".jpg", newline: str = "\n", folders: dict[str, str] | None = None
) -> Path:
    """The recorded files of a data set, below `root`."""
    for folder, lines in RECORDED["files"][name].items():
        if folder.endswith(".txt"):
            root.mkdir(parents=True, exist_ok=True)
            (root / folder).write_bytes((newline.join(lines) + newline + newline).encode())
            part = (folders or MSMT17_FOLDERS)[folder[5:-4]]
            lines = [f"{part}/{line.split()[0]}" for line in lines]
        for line in lines:
            touch(root / ("" if "/" in line else folder) / line.replace(".jpg", suffix))
    return root


def tuples(split: Split, part: str) -> list[tuple[str, int, int]]:
    return [(os.path.relpath(r.path, split.root), r.person, r.camera) for r in getattr(split, part)]


@pytest.mark.parametrize("name", ["market1501", "dukemtmc", "msmt17"])
def test_recorded_folders(tmp_path, name):
    split = read(name, write(name, tmp_path / name).parent)
    for part in ("query", "gallery"):
        assert tuples(split, part) == sorted((path, person, camera) for path, person, camera, _ in RECORDED[name][part])
    recorded = sorted(RECORDED[name]["train"])
    assert [(path, camera) for path, _, camera in tuples(split, "train")] == [(r[0], r[2]) for r in recorded]
    same_person = {(label, r[1]) for label, r in zip(split.labels, recorded)}  # numbered as the set order had it
    assert len(same_person) == split.num_persons == RECORDED[name]["counts"]["train_pids"]
    assert len(split.cameras) == RECORDED[name]["counts"]["train_cams"]
    assert split.persons == tuple(sorted(split.persons))
    assert "not the published set" in split.warnings[-1]
    assert all(os.path.isabs(record.path) for record in (*split.train, *split.query, *split.gallery))


@pytest.mark.parametrize(
    ("name", "files", "folder"),
    [
        ("market1501", "market1501", "Market-1501-v15.09.15"),
        ("Market-1501", "market1501", "."),
        ("dukemtmc", "dukemtmc", "dukemtmcreid"),
        ("DukeMTMC-reID", "dukemtmc", "dukemtmc-reid/DukeMTMC-reID"),
        ("MSMT17", "msmt17", "MSMT17"),
        ("msmt17", "msmt17", "msmt17/MSMT17_V1"),
    ],
)
def test_folder_names_of_other_systems(tmp_path, name, files, folder):
    write(files, tmp_path / "12_c3" / folder)  # a folder that looks like an image's name must not matter
    split = read(name, tmp_path / "12_c3")
    assert len(split.train) == RECORDED[files]["counts"]["train_imgs"]
    assert split.persons[-1] < 7141


def test_full_counts_raise_no_warning():
    train, query, gallery = (tuple(Record(f"{i}", 1, 0) for i in range(count)) for count in COUNTS)
    assert compare(Split("market1501", "/", train, query, gallery), COUNTS).warnings == ()
    (warning,) = compare(Split("market1501", "/", train[1:], query, gallery), COUNTS).warnings
    assert "train 12,935 (12,936)" in warning


def test_what_archives_and_file_systems_leave_behind(tmp_path):
    root = write("market1501", tmp_path / "market1501")
    for path in ("__MACOSX/market1501/bounding_box_train/._0002_c1s1_000451_03.jpg", "market1501/query/Thumbs.db"):
        touch(tmp_path / path)
    touch(root / "query" / "._0001_c1s1_001051_00.jpg")
    train = root / "bounding_box_train"
    os.mkfifo(train / "0002_c1s1_000000_00.jpg")
    (train / "0002_c1s1_000000_01.jpg").symlink_to("0002_c1s1_000000_01.jpg")
    (train / "0002_c1s1_000000_02.jpg").symlink_to("nowhere")
    (train / "0002_c1s1_000000_03.jpg").mkdir()
    (train / "0002_c1s1_000000_04.jpg").symlink_to(train / "0002_c1s1_000451_03.jpg")
    split = read("market1501", tmp_path)
    assert (len(split.train), len(split.query)) == (6, 2)  # one more by a link to a file
    assert {reason: len(paths) for reason, paths in split.left_out.items()} == {
        "junk: person -1": 1,
        "hidden, or a system's metadata": 1,  # what lies beside the data set's own folder is not of it
        "not a regular file: a dangling link, a FIFO or a device": 3,
    }
    assert (split.used, split.found) == (len({*split.train, *split.query, *split.gallery}), split.used + 5)


@pytest.mark.parametrize("name", ["1_c2 é ü.jpg", "1_c2" + "x" * 247 + ".jpg", os.fsdecode(b"1_c2_\xff\xfe.jpg")])
def test_strange_names(tmp_path, name):
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 8)).save(tmp_path / folder / name)
    split = read("market", tmp_path)
    assert (split.train[0].person, split.train[0].camera) == (1, 0)
    assert split.camera_names == {0: "2"}
    split.describe().encode()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: root.rename(root.with_name("elsewhere")), "no bounding_box_train or bounding_box_test in"),
        (lambda root: (root / "query").rename(root / "q"), "no folder query.*(?s:.)*found in .*: .*q"),
        (lambda root: [p.unlink() for p in (root / "query").iterdir()], "no images in .*query"),
        (lambda root: touch(root / "query/portrait.jpg"), "must begin with <person>_c<camera>(?s:.)*portrait"),
        (lambda root: touch(root / "query/1_c0.jpg"), "cameras counted from 1"),
        (lambda root: write("market1501", root.with_name("Market-1501")), "several copies"),
    ],
)
def test_wrong_folders_are_named_with_the_layout_expected(tmp_path, break_it, message):
    break_it(write("market1501", tmp_path / "market1501"))
    with pytest.raises(DataError, match=message):
        read("market1501", tmp_path)


def test_missing_root_and_unknown_name(tmp_path):
    with pytest.raises(DataError, match=r"ROOT_DIR: no folder .*nowhere\nexpected:\n  bounding_box_train/0002_c1s1"):
        read("market1501", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"NAMES must be one of market1501.*got 'markt1501'; did you mean market1501"):
        read("markt1501", tmp_path)
    assert DataError.exit_code == 2
