"""Own data: a folder per person, and CSV files."""

import os
from pathlib import Path

import pytest

from fusionreid.dataloading import DataError, read_split
from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.records import Split
from tests import ROOT


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


def test_the_list_that_the_manual_makes(tmp_path, monkeypatch):
    make(tmp_path / "crops", *(f"{person}/{camera}_{i}.jpg" for person in ("anna", "Jörg, M", "p 3", "p4", "p5")
                               for camera in ("hall 2_b", "Tür") for i in range(3)), "p4/.DS_Store")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/own-cameras.md").read_text(encoding="utf-8")
    exec(text.split("```python")[1].split("```")[0], {})
    split = read("csv", tmp_path / "crops.csv")
    assert [len(getattr(split, part)) for part in ("train", "query", "gallery")] == [18, 4, 8]
    assert {r.camera for r in split.train} == {r.camera for r in split.query} == {0, 1}
    assert not {r.person for r in split.train} & {r.person for r in (*split.query, *split.gallery)}
    assert all(os.path.isfile(r.path) for r in (*split.train, *split.query, *split.gallery))


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
        (("train/a/1.jpg", "query/1.jpg", "gallery/a/1.jpg"), "no images in .*query"),
        (
            ("train/a/c1.jpg", "query/a/1.jpg", "gallery/a/c1.jpg"),
            "1 of 3 images name no camera, the first is .*query/a/1",
        ),
    ],
)
def test_wrong_folders(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        read("folder", make(tmp_path, *files))


def test_csv(tmp_path):
    file = tmp_path / "my crops.csv"
    rows = [
        "path,person,camera,split",
        "a.jpg,anna,door,train",
        '"b, c.jpg", anna ,hall,query',
        f"{tmp_path}/d.jpg,bob,door,gallery",
    ]
    file.write_bytes(("\ufeff" + "\r\n".join(rows) + "\r\n\r\n").encode())
    split = read("csv", file)
    assert [(r.path, r.person, r.camera) for r in (*split.train, *split.query, *split.gallery)] == [
        (f"{tmp_path}/a.jpg", 1, 0),
        (f"{tmp_path}/b, c.jpg", 1, 1),
        (f"{tmp_path}/d.jpg", 2, 0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks path, person, camera, split"),
        ("path,person,split\n", "lacks camera in its header"),
        (
            "path,person,camera,split\na.jpg,1,1,train\nb.jpg,1,1,test\n",
            r":3 must have .* got 'b.jpg', '1', '1', 'test'",
        ),
        ("path,person,camera,split\na.jpg,1,,train\n", ":2 must have"),
        ("path,person,camera,split\na.jpg,1\n", ":2 must have"),
        ("path,person,camera,split\na.jpg,1,1,train\n", "no images for query"),
    ],
)
def test_wrong_csv(tmp_path, text, message):
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read("csv", tmp_path / "data.csv")


def test_missing_csv(tmp_path):
    with pytest.raises(DataError, match=r"csv: no file .*\nexpected:"):
        read("csv", tmp_path)
