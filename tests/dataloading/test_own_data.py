"""Own data of any layout to a split, a list that reproduces it, and sizes that fit."""

from itertools import product
from pathlib import Path

import pytest

from fusionreid.dataloading import DataError, Split
from fusionreid.dataloading.account import write_list
from fusionreid.dataloading.own_data import fit_sizes, read_own_data
from fusionreid.dataloading.records import PARTS
from tests.dataloading.test_folder import make, read

PERSONS, CAMERAS, NUMBERS = [f"{i:04}" for i in range(1, 13)], ("hall", "door", "yard"), (1, 2)
LAYOUTS = {
    "a folder per person, then camera": "{person}/{camera}/{number}.jpg",
    "a folder per camera, then person": "{camera}/{person}/{number}.jpg",
    "cameras in names of files": "{person}/{camera}_{number:03}.jpg",
    "days below the camera": "{person}/{camera}/2024-01-0{number}/x.jpg",
    "Market's names": "{person}_c{index}s1_{number:06}_00.jpg",
}


def ids(split: Split) -> list[list[tuple[str, str]]]:
    """Names of person and camera of every record, part by part."""
    return [
        sorted((split.person_names[r.person], split.camera_names[r.camera]) for r in getattr(split, p)) for p in PARTS
    ]


def write(root: Path, layout: str) -> Path:
    cases = product(PERSONS, enumerate(CAMERAS, 1), NUMBERS)
    return make(root, *(layout.format(person=p, camera=c, index=i, number=n) for p, (i, c), n in cases))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_found_and_divided_by_persons(tmp_path, layout):
    split, decisions, divided, _ = read_own_data(write(tmp_path / "own", LAYOUTS[layout]))
    assert divided
    assert (split.found, split.used, split.left_out) == (72, 72, {})
    train, test = ({r.person for r in records} for records in (split.train, (*split.query, *split.gallery)))
    assert (len(train), len(test), train & test) == (9, 3, set())
    assert len(split.camera_names) == 3
    assert (len(split.query), len(split.gallery)) == (9, 9)  # of every test person one image of each camera
    assert split.warnings == ()
    assert "9 persons to train on, 3 to test with, drawn with seed 0" in decisions[-1]


def test_all_layouts_give_the_same_split(tmp_path):
    roots = [write(tmp_path / str(number), layout) for number, layout in enumerate(LAYOUTS.values())]
    splits = [ids(read_own_data(root, seed=7).split) for root in roots]
    persons = [[sorted({person for person, _ in part}) for part in split] for split in splits]
    assert persons == [persons[0]] * len(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_list_reproduces_the_split(tmp_path, layout):
    own = read_own_data(write(tmp_path / "own", LAYOUTS[layout]), seed=3)
    assert ids(read_own_data(tmp_path / "own", seed=3).split) == ids(own.split)
    assert ids(read_own_data(tmp_path / "own", seed=4).split) != ids(own.split)
    write_list(own.split, tmp_path / "split.csv")
    again = read("csv", tmp_path / "split.csv")
    assert [getattr(again, part) for part in PARTS] == [getattr(own.split, part) for part in PARTS]
    assert not read_own_data(tmp_path / "split.csv").divided


def test_what_is_divided_already_stays_so(tmp_path):
    make(tmp_path / "f", "train/a/c1.jpg", "query/b/c1.jpg", "gallery/b/c2.jpg")
    make(tmp_path / "m", "bounding_box_train/1_c1.jpg", "query/2_c1.jpg", "bounding_box_test/2_c2.jpg")
    for folder in ("f", "m"):
        split, _, divided, _ = read_own_data(tmp_path / folder)
        assert (divided, len(split.train), len(split.query), len(split.gallery)) == (False, 1, 1, 1)


def test_a_list_without_a_split_is_divided(tmp_path):
    rows = [f"{p}/{c}.jpg,{p},{c}" for p, c in product(PERSONS, CAMERAS)]
    (tmp_path / "list.csv").write_text("\n".join(["path,person,camera", *rows]))
    split, _, divided, _ = read_own_data(tmp_path / "list.csv")
    assert (divided, split.used, len(split.query), len(split.gallery)) == (True, 36, 3, 6)


def test_tracks_are_no_cameras_and_loose_images_are_named(tmp_path):
    make(
        tmp_path,
        *(f"{p}/track{t}{p}/{n}.jpg" for p, t, n in product("abcdef", (1, 2), NUMBERS)),
        "loose.jpg",
        "-1/x/1.jpg",
    )
    split, decisions, *_ = read_own_data(tmp_path)
    assert "tracks or days" in decisions[0]
    assert "no cameras named" in split.note
    assert {reason: len(paths) for reason, paths in split.left_out.items()} == {
        "in no person's folder, and its name does not begin with <person>_c<camera>": 1,
        "junk: person -1": 1,
    }


def test_distractors_of_market_are_not_trained_on(tmp_path):
    make(tmp_path, *(f"{p}_c{c}_1.jpg" for p, c in product((*PERSONS, "0000", "-1"), (1, 2))))
    split = read_own_data(tmp_path).split
    assert {split.person_names[r.person] for r in split.train} < {*PERSONS}
    assert sum(r.person == 0 for r in split.gallery) == 2


def test_one_camera_alone_is_no_camera(tmp_path):
    make(tmp_path, *(f"{p}/cam1/{n}.jpg" for p, n in product(PERSONS, NUMBERS)))
    split, decisions, *_ = read_own_data(tmp_path)
    assert "no person was taken by two cameras" in decisions[1]
    assert ({r.camera for r in split.query}, {r.camera for r in split.gallery}) == ({0}, {1})


@pytest.mark.parametrize("files", [("a/1.jpg", "b/1.jpg", "c/1.jpg"), ("a/1.jpg", "a/2.jpg"), ("1.jpg",), ()])
def test_too_little_is_refused(tmp_path, files):
    with pytest.raises(DataError, match=r"at least 3 persons are needed|no images of persons in"):
        read_own_data(make(tmp_path, *files))
    with pytest.raises(DataError, match="there is no folder and no list"):
        read_own_data(tmp_path / "nowhere")


def test_sizes_fit_persons_and_images(tmp_path):
    sizes = fit_sizes(read_own_data(write(tmp_path / "own", LAYOUTS["cameras in names of files"])).split)
    assert (sizes.batch, sizes.instances, sizes.epochs) == (36, 4, 120)
    assert sizes.reasons[0] == "DATALOADER.NUM_INSTANCE 4: half of the persons have 6 images or fewer"


def test_what_is_unclear_is_left_out_and_told_before_the_division(tmp_path):
    """Persons who may be two, images of two persons, rows that cannot be read; cameras that may be two become one."""
    rows = [(f"{p}{c}{n}.jpg", p, c) for p, c, n in product(PERSONS, ("cam1", "2"), NUMBERS)]
    rows += [("x1.jpg", "9", "1"), ("x2.jpg", "9", "2"), (rows[0][0], "0007", "cam1"), ("y.jpg", "", "2")]
    rows += [("z.jpg", "0003", "1")]
    (tmp_path / "list.csv").write_text("\n".join(["path,person,camera", *map(",".join, rows)]))
    own = read_own_data(tmp_path / "list.csv")
    faults = "\n".join(own.faults)
    for text in ("1 rows that cannot be used", "line 53: person must not be empty", "1 images belong to two persons"):
        assert text in faults
    for text in ("1 persons may be spelt in two ways: '0009' (4) = '9' (2)", "1 cameras may be spelt in two ways"):
        assert text in faults
    assert {reason: len(paths) for reason, paths in own.split.left_out.items()} == {
        "given to two persons or cameras": 1,
        "its person may be spelt in two ways": 6,
    }
    assert (own.split.used, len(own.split.camera_names)) == (44, 2)
    assert not {"9", "0009"} & {*own.split.person_names.values()}
    write_list(own.split, tmp_path / "clean.csv")
    assert ids(read("csv", tmp_path / "clean.csv")) == ids(own.split)
    (tmp_path / "list.csv").write_text("path,person\na.jpg,\nb.jpg,b\n")
    with pytest.raises(DataError, match=r"(?s)1 rows that cannot be used.*at least 3 persons are needed"):
        read_own_data(tmp_path / "list.csv")
