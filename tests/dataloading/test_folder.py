"""Own data in folders: who is a person, who a camera, and what is left out."""

import os
from pathlib import Path

import pytest

from fusionreid.dataloading import DataError, read_split
from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.records import Split

SUFFIXES = ("jpg", "JPEG", "jfif", "jpe", "png", "bmp", "gif", "tif", "webp", "ppm", "pgm", "pbm", "pnm")


def make(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")
    return root


def read(name: str, root: Path) -> Split:
    return read_split(DatasetsConfig(NAMES=name, ROOT_DIR=str(root)))


def tuples(split: Split, part: str) -> list[tuple[str, int, int]]:
    return [(os.path.relpath(r.path, split.root), r.person, r.camera) for r in getattr(split, part)]


def test_camera_in_the_name(tmp_path):
    make(
        tmp_path,
        "train/10/c3_1.jpg",
        "train/9/x_c3s1_2.png",
        "query/Eve/a-c10.JPG",
        "gallery/Eve/c04.jpg",
        "train/n.txt",
    )
    split = read("folder", tmp_path)
    assert tuples(split, "train") == [
        ("train/10/c3_1.jpg", 2, 0),
        ("train/9/x_c3s1_2.png", 1, 0),
    ]  # by value: 9 < 10 < Eve
    assert tuples(split, "query") == [("query/Eve/a-c10.JPG", 3, 2)]
    assert tuples(split, "gallery") == [("gallery/Eve/c04.jpg", 3, 1)]
    assert split.labels == [1, 0]
    assert (split.num_persons, split.num_cameras) == (2, 1)


@pytest.mark.parametrize("name", ["cam3_1.jpg", "Camera3.jpg", "x-CAM03-1.png", "c3s2_1.jpg"])
def test_a_camera_spelt_out(tmp_path, name):
    make(tmp_path, f"train/a/{name}", "query/b/cam4.jpg", "gallery/b/came5_c3.jpg")
    split = read("folder", tmp_path)
    assert [getattr(split, part)[0].camera for part in ("train", "query", "gallery")] == [0, 1, 0]


def test_a_folder_per_camera_and_links_that_lead_back(tmp_path):
    make(tmp_path, "train/a/hall/1.jpg", "train/a/door/1.jpg", "query/b/hall/c9.jpg", "gallery/b/door/1.jpg")
    (tmp_path / "train/a/loop").symlink_to(tmp_path / "train")
    split = read("folder", tmp_path)
    assert tuples(split, "train") == [("train/a/door/1.jpg", 1, 0), ("train/a/hall/1.jpg", 1, 1)]
    assert [r.camera for r in (*split.query, *split.gallery)] == [1, 0]


def test_without_cameras_nothing_is_left_out_of_the_gallery(tmp_path):
    split = read("folder", make(tmp_path, "train/a/1.jpg", "query/b/cafe12.jpg", "gallery/b/3.jpg"))
    assert [getattr(split, part)[0].camera for part in ("train", "query", "gallery")] == [0, 0, 1]
    assert "no cameras named" in split.note


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("train/a/1.jpg", "gallery/a/1.jpg"), "no folder query in (?s:.)*expected:(?s:.)*found in .*gallery, train"),
        (
            ("train/a/1.jpg", "query/1.jpg", "gallery/a/1.jpg"),
            "no images in a person's folder in .*query(?s:.)*left out: 1: in no person's folder",
        ),
        (
            ("train/a/c1.jpg", "query/a/1.jpg", "gallery/a/c1.jpg"),
            "1 of 3 images name no camera, the first is .*query/a/1",
        ),
    ],
)
def test_wrong_folders(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        read("folder", make(tmp_path, *files))


def test_cameras_above_persons_are_told_apart_by_the_data(tmp_path):
    for part, persons in {
        "train": ("0001", "0002", "0003", "0004"),
        "query": ("0005",),
        "gallery": ("0005", "6"),
    }.items():
        make(
            tmp_path / part, *(f"{camera}/{person}/x.jpg" for camera in ("hall", "door", "yard") for person in persons)
        )
    split = read("folder", tmp_path)
    assert (split.num_persons, len(split.cameras)) == (4, 3)
    assert sorted(split.camera_names.values()) == ["door", "hall", "yard"]
    assert "cameras are above persons: folder level 1 is the camera, its names recur" in split.note


def test_words_for_cameras_tell_where_persons_recur(tmp_path):
    for part in ("train", "query", "gallery"):
        make(tmp_path / part, *(f"Cam {camera}/{person}/x.jpg" for camera in (1, 2) for person in ("a", "b", "c")))
    split = read("folder", tmp_path)
    assert (split.num_persons, len(split.cameras)) == (3, 2)
    assert "named like cameras" in split.note


@pytest.mark.parametrize("order", ["person camera day", "camera person day", "day person camera", "person day camera"])
def test_a_day_among_the_folders(tmp_path, order):
    for part, persons in {"train": "abcd", "query": "e", "gallery": "ef"}.items():
        for person in persons:
            for camera in ("hall", "door", "yard"):
                for day in ("2024-01-31", "2024-02-01"):
                    names = {"person": person, "camera": camera, "day": day}
                    make(tmp_path.joinpath(part, *(names[level] for level in order.split())), "x.jpg")
    split = read("folder", tmp_path)
    assert (split.num_persons, sorted(split.camera_names.values())) == (4, ["door", "hall", "yard"])
    assert (split.found, split.used, split.left_out) == (42, 42, {})


def test_without_evidence_persons_are_above_and_a_doubt_is_told(tmp_path):
    for part in ("train", "query", "gallery"):
        make(tmp_path / part, *(f"{one}/{two}/x.jpg" for one in "ab" for two in "uvwxyz"))
    split = read("folder", tmp_path)
    assert (split.num_persons, len(split.cameras)) == (2, 6)
    assert "nothing tells whether persons are above cameras" in split.warnings[0]


def test_links_to_folders_are_followed_and_end(tmp_path):
    make(tmp_path / "store", *(f"{person}/c{camera}.jpg" for person in "abcd" for camera in (1, 2)))
    make(tmp_path / "data", "train/e/c1.jpg", "query/b/c1.jpg", "gallery/b/c2.jpg")
    for person in "ac":
        (tmp_path / f"data/train/{person}").symlink_to(tmp_path / "store" / person)
    (tmp_path / "data/gallery/d").symlink_to("../../store/d")
    (tmp_path / "data/train/e/back").symlink_to("../..")
    (tmp_path / "store/a/self").symlink_to(tmp_path / "store/a")
    split = read("folder", tmp_path / "data")
    assert [len(getattr(split, part)) for part in ("train", "query", "gallery")] == [5, 1, 3]
    assert {reason: len(paths) for reason, paths in split.left_out.items()} == {"a link to a folder that leads back": 2}


def test_every_image_is_used_or_named_with_the_reason(tmp_path, monkeypatch):
    make(
        tmp_path,
        *(f"train/{person}/c{camera}.{suffix}" for person in ("1", "2") for camera, suffix in enumerate(SUFFIXES)),
        *("query/3/c1.JPG", "gallery/3/c2.Jfif", "gallery/0000/c1.jpg", "gallery/-1/c1.jpg", "gallery/-1/c2.jpg"),
        *("train/loose.jpg", "other/1/c1.jpg", "top.png", "train/1/c1.heic", "train/1/._c1.jpg", "train/1/.c1.jpg"),
        *("__MACOSX/train/1/c1.jpg", "train/@eaDir/c1.jpg", "train/1/Thumbs.db", "train/1/notes.txt"),
    )
    (tmp_path / "train/1/c1.jpg_large").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "train/1/c9.jpg").symlink_to("nowhere")
    make(tmp_path, "train/locked/c1.jpg")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    split = read("folder", tmp_path)
    counts = {reason: len(paths) for reason, paths in split.left_out.items()}
    assert counts == {
        "hidden, or a system's metadata": 4,
        "not a regular file: a dangling link, a FIFO or a device": 1,
        "a format that is not read (.heic): convert it to JPEG or PNG": 1,
        "an image by its content, without the suffix of an image": 1,
        "a folder that cannot be read: Permission denied": 1,
        "outside the folders train, query, gallery": 2,
        "in no person's folder": 1,
        "junk: person -1": 2,
    }
    assert split.used == 2 * len(SUFFIXES) + 3
    assert split.found == split.used + sum(counts.values())
    assert split.verdict == "warning"
    for reason, count in counts.items():
        assert f"  {count}: {reason}, such as {tmp_path}" in split.describe()
    assert {r.person for r in split.gallery} == {3, 0}  # 0000, whom nobody searches, is a distractor


def test_what_surely_shows_nobody_raises_no_warning(tmp_path):
    split = read("folder", make(tmp_path, "train/a/c1.jpg", "query/b/c1.jpg", "gallery/b/c2.jpg", "gallery/-1/c1.jpg",
                                "gallery/b/._c2.jpg"))  # fmt: skip
    assert (split.found, split.used, split.verdict) == (5, 3, "ok")


def test_a_control_character_in_a_name_is_never_printed(tmp_path):
    split = read("folder", make(tmp_path, "train/a/c1.jpg", "query/b/c1.jpg", "gallery/b/c2.jpg", "train/\x1b[31m.jpg"))
    assert "\x1b" not in split.describe()
    assert r"\x1b[31m.jpg" in split.describe()
    with pytest.raises(DataError) as caught:
        read("folder", make(tmp_path / "\x1b]0;x\x07", "train/a/1.jpg"))
    assert "\x1b" not in str(caught.value)
