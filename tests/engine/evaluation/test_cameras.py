"""Cameras of new data go by their names: the same number in two lists may be two cameras."""

from pathlib import Path

import pytest

from fusionreid.dataloading import DataError, Split
from fusionreid.engine.config import Config
from fusionreid.engine.evaluation.cameras import known_cameras, number_as_trained
from tests.dataloading.test_csv_list import HEADER, listed

CAMERAS, NAMES = (0, 1, 2), ("door", "hall", "yard")


def split_of(folder: Path, query: str, gallery: str) -> Split:
    return listed(folder, [HEADER, ("a.jpg", "a", query, "query"), ("b.jpg", "a", gallery, "gallery")])


def test_cameras_get_the_numbers_of_training(tmp_path: Path) -> None:
    split = split_of(tmp_path, "Hall", "yard")
    assert (split.query[0].camera, split.gallery[0].camera) == (0, 1)
    again, known = known_cameras(split, ["folder"], CAMERAS, NAMES, Config())
    assert (again.query[0].camera, again.gallery[0].camera) == (1, 2)
    assert again.camera_names == {0: "door", 1: "Hall", 2: "yard"}
    assert known == (0, 1, 2)


def test_a_camera_that_training_never_saw_is_refused_by_name(tmp_path: Path) -> None:
    for query, gallery, new in (("hall", "roof", "roof"), ("lift", "roof", "lift, roof")):
        split = split_of(tmp_path, query, gallery)
        with pytest.raises(DataError, match=f"images of the cameras {new}; training had only door, hall, yard, so the"):
            known_cameras(split, ["folder"], CAMERAS, NAMES, Config())


def test_cameras_of_one_of_several_sets_go_by_their_names_in_it(tmp_path: Path) -> None:
    split, names = split_of(tmp_path, "Hall", "yard"), ("market1501/1", "list/hall", "other/yard")
    with pytest.raises(DataError, match="cameras yard; training had only market1501/1, Hall, other/yard"):
        known_cameras(split, ["market1501", "csv", "csv"], CAMERAS, names, Config())
    mean = Config.from_dict({"TEST": {"SIE_UNKNOWN": "mean"}})
    again, known = known_cameras(split, ["market1501", "csv", "csv"], CAMERAS, names, mean)
    assert (again.query[0].camera, again.gallery[0].camera in known) == (1, False)


def test_a_checkpoint_without_names_and_a_split_without_cameras_stay_as_they_are(tmp_path: Path) -> None:
    split = split_of(tmp_path, "hall", "yard")
    assert number_as_trained(split, (0, 1), ("1", "2")) is split
    rows = ("a.jpg", "a", "query"), ("b.jpg", "a", "gallery")
    nameless = listed(tmp_path, [("path", "person", "split"), *rows])
    assert number_as_trained(nameless, CAMERAS, NAMES) is nameless
