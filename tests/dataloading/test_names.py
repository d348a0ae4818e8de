"""Names of persons and cameras: spellings, and what the parts say to each other."""

import unicodedata
from itertools import product

import pytest

from fusionreid.dataloading import DataError
from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets import market1501
from fusionreid.dataloading.datasets.names import camera_key, numbered, person_key
from tests.dataloading.test_csv_list import HEADER, listed
from tests.dataloading.test_folder import make, read

NFC, NFD = (unicodedata.normalize(form, "José") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    "same",
    [("0009", "9", "9.0", " 9 ", "+9", "\uff19"), (NFC, NFD, "JOSÉ"), ("anna  maria", "Anna Maria"), ("-1", "-01")],
)
def test_spellings_of_a_person(same):
    assert len(set(map(person_key, same))) == 1


@pytest.mark.parametrize("same", [("cam1", "1", "c01", "Camera_1", "cam 1.0"), ("Hall", "hall")])
def test_spellings_of_a_camera(same):
    assert len(set(map(camera_key, same))) == 1


def test_other_names_stay_apart():
    assert len(set(map(person_key, ("9", "90", "-9", "9a", "9.5", "cam9", "anna", "ann a")))) == 8
    assert len(set(map(camera_key, ("1", "11", "campus", "camp1", "c1s1", "-1")))) == 6
    assert numbered(["b", "10", "9", "cam11", "a"], 1) == {"9": 1, "10": 2, "cam11": 3, "a": 4, "b": 5}
    assert person_key("9" * 5000) == "9" * 5000


@pytest.mark.parametrize("pair", [("0009", "9"), ("9", "9.0"), ("anna", "Anna"), (NFC, NFD)])
def test_a_person_spelt_differently_in_query_and_gallery_keeps_its_matches(tmp_path, pair):
    split = read("folder", make(tmp_path, "train/1/c1.jpg", f"query/{pair[0]}/c1.jpg", f"gallery/{pair[1]}/c2.jpg"))
    assert split.query[0].person == split.gallery[0].person
    assert (
        f"1 persons are spelt in two ways and were taken as one each: {pair[0]!r} (1 in query) = " in split.warnings[0]
    )
    assert split.verdict == "warning"


@pytest.mark.parametrize("pair", [("cam1", "1"), ("Hall", "hall"), ("01", "1.0")])
def test_a_camera_spelt_differently_is_one_camera(tmp_path, pair):
    rows = [("a.jpg", "a", "9", "train"), ("b.jpg", "b", pair[0], "query"), ("c.jpg", "b", pair[1], "gallery"),
            ("d.jpg", "b", "9", "gallery")]  # fmt: skip
    split = listed(tmp_path, [HEADER, *rows])
    assert split.query[0].camera == split.gallery[0].camera
    assert "1 cameras are spelt in two ways" in split.warnings[0]


def test_two_spellings_in_one_part_are_for_their_owner_to_settle(tmp_path):
    rows = [
        ("a.jpg", "0009", "cam1", "train"),
        ("b.jpg", "9", "1", "train"),
        ("c.jpg", "x", "1", "query"),
        ("d.jpg", "x", "2", "gallery"),
    ]
    with pytest.raises(DataError) as caught:
        listed(tmp_path, [HEADER, *rows])
    persons, cameras = str(caught.value).splitlines()
    assert "1 persons may be spelt in two ways: '0009' (1 in train) = '9' (1 in train); write each" in persons
    assert "1 cameras may be spelt in two ways: 'cam1' (1 in train) = '1' (1 in train, 1 in query)" in cameras


def test_two_unicode_forms_in_one_part_are_one_name(tmp_path):
    make(tmp_path, f"train/{NFC}/c1.jpg", f"train/{NFD}/c2.jpg", "query/b/c1.jpg", "gallery/b/c2.jpg")
    split = read("folder", tmp_path)
    assert split.num_persons == 1
    assert "1 persons are spelt in two ways" in split.warnings[0]


def test_persons_in_train_and_test_are_told_for_every_reader(tmp_path):
    make(tmp_path / "f", "train/anna/c1.jpg", "train/x/c1.jpg", "query/Anna/c1.jpg", "gallery/anna/c2.jpg")
    make(tmp_path / "m", "bounding_box_train/0007_c1_1.jpg", "query/7_c1_1.jpg", "bounding_box_test/0007_c2_1.jpg")
    rows = [("a.jpg", "p", "1", "train"), ("b.jpg", "p", "1", "query"), ("c.jpg", "p", "2", "gallery")]
    splits = [read("folder", tmp_path / "f"), read("market", tmp_path / "m"), listed(tmp_path, [HEADER, *rows])]
    for split, name in zip(splits, ("anna", "0007", "p"), strict=True):
        text = f"1 persons to train on are also in query or gallery, which flatters every measure: {name!r}; put all"
        assert any(text in warning for warning in split.warnings)


def test_queries_that_can_have_no_match_are_told(tmp_path):
    make(tmp_path / "query", "person_9/c1.jpg", "b/c1.jpg", "c/c1.jpg")
    make(tmp_path / "gallery", "person-9/c2.jpg", "b/c1.jpg", "c/c1.jpg", "c/c2.jpg")
    make(tmp_path / "train", "a/c1.jpg")
    lost, alone = read("folder", tmp_path).warnings
    assert "1 of 3 queries show persons that the gallery lacks" in lost
    assert "'person_9' (gallery has 'person-9')" in lost
    assert "1 of 3 queries have their person in the gallery only from their own camera" in alone
    assert "'b'" in alone


def test_cameras_are_numbered_by_order_and_keep_their_names(tmp_path):
    names = [f"{person:04}_c{camera}_1.jpg" for person in (1, 2) for camera in (20240101, 3)]
    make(tmp_path / "bounding_box_train", *names)
    make(tmp_path, "query/0003_c3_1.jpg", "bounding_box_test/0003_c20240101_1.jpg")
    split = read("market", tmp_path)
    assert (split.num_cameras, split.camera_names) == (2, {0: "3", 1: "20240101"})
    assert split.person_names[3] == "0003"


def test_a_running_number_taken_for_a_camera_is_told(tmp_path):
    names = [f"train/{i % 9}/c{1000 + i}.jpg" for i in range(120)]
    split = read("folder", make(tmp_path, *names, "query/x/c1000.jpg", "gallery/x/c1001.jpg"))
    assert (
        "120 cameras took 122 images: is what was read as the camera a date or a running number?" in split.warnings[0]
    )


def test_the_same_persons_through_every_reader(tmp_path):
    rows = []
    persons_of = {"train": ("0001", "0002"), "query": ("0003",), "gallery": ("0003", "0004", "0000", "-1")}
    for part, folder in market1501.PARTS.items():
        for name, camera in product(persons_of[part], (1, 2)):
            files = f"f/{part}/{name}/c{camera}.jpg", f"m/{folder}/{name}_c{camera}_1.jpg"
            make(tmp_path, *files, f"d/{part}/cam{camera}/{name}/x.jpg")
            rows.append((f"l/{part}{name}{camera}.jpg", name.lstrip("0") or "0", f"cam{camera}", part))
    splits = [read("folder", tmp_path / "f"), read("market", tmp_path / "m"), read("folder", tmp_path / "d")]
    splits.append(listed(tmp_path, [HEADER, *rows]))
    ids = [[sorted((r.person, r.camera) for r in getattr(s, part)) for part in market1501.PARTS] for s in splits]
    assert ids == [ids[0]] * 4
    assert ids[0][2] == [(0, 0), (0, 1), (3, 0), (3, 1), (4, 0), (4, 1)]


def test_a_data_set_in_a_list_of_one():
    assert DatasetsConfig(NAMES=("Market1501",)).NAMES == "Market1501"
    with pytest.raises(ValueError, match="NAMES"):
        DatasetsConfig(NAMES=())
