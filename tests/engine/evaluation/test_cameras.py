"""Cameras of new data go by their names: the same number in two lists may be two cameras."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from fusionreid.dataloading import DataError, Split
from fusionreid.engine.config import Config
from fusionreid.engine.evaluation.cameras import number_as_trained
from fusionreid.engine.reporting.evaluate_run import known_cameras
from tests.dataloading.test_csv_list import HEADER, listed

TRAINED = SimpleNamespace(cameras=(0, 1, 2), camera_names=("door", "hall", "yard"), dataset="folder")
CSV = Config.from_dict({"DATASETS": {"NAMES": "csv"}})


def split_of(folder: Path, query: str, gallery: str) -> Split:
    return listed(folder, [HEADER, ("a.jpg", "a", query, "query"), ("b.jpg", "a", gallery, "gallery")])


def test_cameras_get_the_numbers_of_training(tmp_path: Path) -> None:
    split = split_of(tmp_path, "Hall", "yard")
    assert (split.query[0].camera, split.gallery[0].camera) == (0, 1)
    again = number_as_trained(split, TRAINED.cameras, TRAINED.camera_names)
    assert (again.query[0].camera, again.gallery[0].camera) == (1, 2)
    assert again.camera_names == {0: "door", 1: "Hall", 2: "yard"}
    assert known_cameras(TRAINED, again, CSV) == (0, 1, 2)


def test_a_camera_that_training_never_saw_is_refused_by_name(tmp_path: Path) -> None:
    for query, gallery, new in (("hall", "roof", "roof"), ("lift", "roof", "lift, roof")):
        split = number_as_trained(split_of(tmp_path, query, gallery), TRAINED.cameras, TRAINED.camera_names)
        with pytest.raises(DataError, match=f"images of the cameras {new}; training had only door, hall, yard, so the"):
            known_cameras(TRAINED, split, CSV)


def test_a_checkpoint_without_names_and_a_split_without_cameras_stay_as_they_are(tmp_path: Path) -> None:
    split = split_of(tmp_path, "hall", "yard")
    assert number_as_trained(split, (0, 1), ("1", "2")) is split
    rows = ("a.jpg", "a", "query"), ("b.jpg", "a", "gallery")
    nameless = listed(tmp_path, [("path", "person", "split"), *rows])
    assert number_as_trained(nameless, TRAINED.cameras, TRAINED.camera_names) is nameless
