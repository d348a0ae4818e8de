"""Own data in odd layouts: read as people mean them, or refused; never misread in silence."""

from itertools import product
from pathlib import Path

import pytest

from fusionreid.dataloading import DataError, Split
from fusionreid.dataloading.account import write_list
from fusionreid.dataloading.own_data import OwnData, read_own_data
from fusionreid.dataloading.records import PARTS
from tests.dataloading.test_folder import make, read

PERSONS = [f"{i:04}" for i in range(1, 9)]


def write(root: Path, layout: str, persons=PERSONS, cameras=("hall", "door"), numbers=(1, 2)) -> Path:
    cases = product(persons, enumerate(cameras, 1), numbers)
    return make(root, *(layout.format(p=p, c=c, i=i, n=n) for p, (i, c), n in cases))


def persons_of(split: Split, part: str) -> set[str]:
    return {split.person_names[record.person] for record in getattr(split, part)}


def told(own: OwnData) -> str:
    return "\n".join([*own.decisions, own.split.note, *own.split.warnings])


@pytest.mark.parametrize("layout", [
    "images/{p}/{c}/{n}.png", "a/b/{p}/{c}_{n}.png", "train/{p}/{c}/{n}.png",
    "2024-01-0{n}/{p}/{c}/x.png", "2024-01-0{n}/{c}/{p}/x.png", "monday/{p}/{c}/{n}.png",
    "{p}/{c}/track{n}/x.png", "{p}/{c}/2024/0{n}/10/x.JPE", "{p}/{c}_2024-01-0{n}_10-00-0{n}.png",
    "{p}/{c}_20240101T10000{n}.png", "person_{p}/{c}/{n}.png", "{c}/person_{p}/{n}.png",
])  # fmt: skip
def test_persons_and_cameras_are_told_from_days_tracks_and_wrappers(tmp_path, layout):
    own = read_own_data(write(tmp_path, layout))
    split = own.split
    assert (split.found, split.used, split.num_persons) == (32, 32, 6)
    assert set(split.camera_names.values()) == {"hall", "door"}
    assert split.warnings == ()


@pytest.mark.parametrize(("layout", "cameras"), [
    ("{p}/{p}C{i}T0001F00{n}.jpg", {"1", "2"}), ("{p}-cam{i}-{n}.png", {"1", "2"}), ("{p}_x_c{i}_{n}.png", {"1", "2"}),
    ("{p}/track{n}/{c}.png", set()), ("{p}/session {n}/{c}.png", set()),
])  # fmt: skip
def test_names_of_files_tell_cameras_and_tracks_are_none(tmp_path, layout, cameras):
    split = read_own_data(write(tmp_path, layout)).split
    assert (split.used, split.num_persons) == (32, 6)
    assert set(split.camera_names.values()) == cameras


@pytest.mark.parametrize(("layout", "cameras"), [
    ("{p}/{c}/007{k}_c{i}_{n}.png", {"hall", "door"}), ("{p}/day {n}/007{k}_c{i}_{n}.png", {"1", "2"}),
    ("{p}/007{k}_c{i}_{n}.png", {"1", "2"}),
])  # fmt: skip
def test_names_of_folders_win_where_names_of_files_say_the_same(tmp_path, layout, cameras):
    for k, person in enumerate(("Anna", "Bob", "Cy", "-1", "Dora")):
        write(tmp_path, layout.replace("{k}", str(k)), (person,))
    make(tmp_path, "Anna/hall/a person.png")
    split = read_own_data(tmp_path).split
    assert {*split.person_names.values()} == {"Anna", "Bob", "Cy", "Dora"}
    assert {*split.camera_names.values()} == cameras
    assert len(split.left_out["junk: person -1"]) == 4
    assert split.used == (17 if "hall" in cameras else 16)


@pytest.mark.parametrize("layout", ["{c}/{p}_c{i}_{n}.png", "monday/{p}_c{i}_{n}.png", "day {n}/{p}_c{i}_{n}.png"])
def test_names_of_files_win_where_folders_divide_otherwise(tmp_path, layout):
    split = read_own_data(write(tmp_path, layout)).split
    assert {*split.person_names.values()} == {*PERSONS}
    assert {*split.camera_names.values()} == {"1", "2"}


def test_a_link_to_a_folder_that_is_read_itself_is_left_out(tmp_path):
    write(tmp_path / "store/crops", "{p}/{c}/{n}.png")
    write(tmp_path / "elsewhere", "{p}/{c}/{n}.png", ("Zoe",))
    crops = tmp_path / "crops"
    crops.symlink_to(tmp_path / "store/crops")
    (crops / "0001 again").symlink_to(crops / "0001")
    (crops / "Zoe").symlink_to(tmp_path / "elsewhere/Zoe")
    split = read_own_data(crops).split
    assert {*split.person_names.values()} == {*PERSONS, "Zoe"}
    assert {reason: len(paths) for reason, paths in split.left_out.items()} == {
        "in a folder that is a link to another one here": 4
    }


@pytest.mark.parametrize(("layout", "persons"), [
    ("{c}/{p}/{n}.png", ("a", "b", "c")), ("{p}/{c}/{n}.png", ("anna", "bob")), ("{c}/{p}/{n}.png", "abcde")
])  # fmt: skip
def test_numbers_alone_leave_a_doubt_that_is_told(tmp_path, layout, persons):
    own = read_own_data(write(tmp_path, layout, persons, ("hall", "door", "yard")))
    assert own.split.verdict == "warning"
    assert "only their numbers tell persons from cameras" in own.split.warnings[0]
    assert "name them cam1, cam2, ..., or make a list" in own.split.warnings[0]


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "val"), ("train", "Validation")])
def test_a_test_part_is_divided_into_query_and_gallery(tmp_path, train, test):
    write(tmp_path, train + "/{p}/{c}/{n}.png", PERSONS[:5])
    own = read_own_data(write(tmp_path, test + "/{p}/{c}/{n}.png", PERSONS[5:]))
    assert persons_of(own.split, "train") == {*PERSONS[:5]}
    assert persons_of(own.split, "query") == persons_of(own.split, "gallery") == {*PERSONS[5:]}
    assert [len(getattr(own.split, part)) for part in PARTS] == [20, 6, 6]
    assert not own.divided


def test_parts_that_show_the_same_persons_are_divided_anew(tmp_path):
    write(tmp_path, "train/{p}/{c}/{n}.png")
    own = read_own_data(write(tmp_path, "val/{p}/{c}/9{n}.png"))
    assert own.divided
    assert "8 of 8 persons to test with are in train too: split again, by person" in told(own)
    assert persons_of(own.split, "train") & persons_of(own.split, "gallery") == set()


def test_parts_may_be_spelt_with_capitals_and_hold_names_of_market(tmp_path):
    write(tmp_path, "Train/{p}_c{i}_{n}.png", PERSONS[:5])
    write(tmp_path, "Query/{p}_c{i}_1.png", PERSONS[5:], ("hall",), (1,))
    own = read_own_data(write(tmp_path, "Gallery/{p}_c{i}_2.png", PERSONS[5:], numbers=(2,)))
    assert [len(getattr(own.split, part)) for part in PARTS] == [20, 3, 6]
    assert (own.split.found, own.split.used) == (29, 29)


def test_query_and_gallery_alone_are_no_cameras(tmp_path):
    write(tmp_path, "query/{p}/{n}.png", cameras=("x",))
    with pytest.raises(DataError, match="has a query and a gallery, and nothing to train on: add a part train"):
        read_own_data(write(tmp_path, "gallery/{p}/{n}.png", cameras=("x",)))


def test_a_market_folder_in_a_wrapper_is_accounted_for_whole(tmp_path):
    write(tmp_path / "d/m", "bounding_box_train/{p}_c{i}_{n}.jpg", PERSONS[:5])
    write(tmp_path / "d/m", "query/{p}_c1_{n}.jpg", PERSONS[5:], ("a",))
    write(tmp_path / "d/m", "bounding_box_test/{p}_c2_{n}.jpg", PERSONS[5:], ("a",))
    split = read_own_data(make(tmp_path / "d", "loose.png")).split
    assert (split.found, split.used) == (33, 32)


def test_a_few_images_without_a_camera_are_left_out_and_many_cost_the_cameras_with_a_warning(tmp_path):
    split = read_own_data(make(write(tmp_path / "few", "{p}/{c}/{n}.png"), "0001/loose.png")).split
    assert split.left_out == {
        "its camera is not named, those of the others are": (str(tmp_path / "few/0001/loose.png"),)
    }
    assert set(split.camera_names.values()) == {"hall", "door"}
    write(tmp_path / "many", "{p}/{c}/{n}.png", PERSONS[:4])
    own = read_own_data(write(tmp_path / "many", "{p}/{c}-{n}.png", PERSONS[4:]))
    assert "16 of 32 images name no camera" in own.split.warnings[0]
    assert "cameras are not used, since many images name none" in told(own)
    assert own.split.camera_names == {}
    write_list(own.split, tmp_path / "list.csv")
    assert [getattr(read("csv", tmp_path / "list.csv"), part) for part in PARTS] == [
        getattr(own.split, part) for part in PARTS
    ]


@pytest.mark.parametrize("layout", ["{p}/c{i}_{n}.png", "{p}_c{i}_{n}.png", "{c}/{p}/{n}.png"])
def test_nobody_and_distractors_are_no_persons_to_learn(tmp_path, layout):
    own = read_own_data(write(tmp_path, layout, [*PERSONS, "-1", "0000", "Junk", "distractors", "unknown", "nan"]))
    split = own.split
    assert persons_of(split, "train") | persons_of(split, "query") == {*PERSONS}
    assert sum(record.person == 0 for record in split.gallery) == 8
    assert {reason.partition(":")[0]: len(paths) for reason, paths in split.left_out.items()} == {
        "junk": 8,
        "of nobody known": 8,
    }
    assert (split.found, split.verdict) == (56, "warning")


def test_distractors_are_of_the_gallery_alone_in_every_reader(tmp_path):
    make(tmp_path, "train/a/c1.jpg", "train/distractors/c1.jpg", "query/b/c1.jpg", "gallery/b/c2.jpg",
         "gallery/distractors/c2.jpg", "gallery/Nan/c1.jpg", "gallery/NaN/c1.jpg")  # fmt: skip
    split = read("folder", tmp_path)
    assert persons_of(split, "train") == {"a"}
    assert persons_of(split, "gallery") == {"b", "distractors", "Nan"}
    assert [len(paths) for paths in split.left_out.values()] == [1, 1]


def test_names_of_any_bytes_survive_the_list(tmp_path):
    write(tmp_path / "own", "{p}/{c}/{n}.png", [*PERSONS, "x\ny", 'o"x, y', " z ", "\udcff\udcfeJ\udce9", "a\u2028b"])
    split = read_own_data(tmp_path / "own").split
    write_list(split, tmp_path / "list.csv")
    again = read("csv", tmp_path / "list.csv")
    assert [getattr(again, part) for part in PARTS] == [getattr(split, part) for part in PARTS]
