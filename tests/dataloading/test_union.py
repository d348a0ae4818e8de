"""Several data sets as one: who is told apart, what is read and counted, and how a batch is shared."""

import numpy as np
import pytest

from fusionreid.dataloading import DataError, read_split
from fusionreid.dataloading.account import account_as_json
from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.index import FILE
from fusionreid.dataloading.plan import epoch_plan
from fusionreid.dataloading.records import UNTESTED, UNTRAINED, check_batch
from tests.dataloading.test_folder import make
from tests.dataloading.test_records import JPEG, image_bytes

TRAIN = [f"train/{person}/c{camera}.jpg" for person in (1, 2) for camera in (1, 2)]
IMAGES = [*TRAIN, "query/3/c1.jpg", "gallery/3/c2.jpg"]


@pytest.fixture
def shops(tmp_path):
    """Two folders with the same names of persons and cameras."""
    for number, shop in enumerate(("north", "south")):
        make(tmp_path / shop, *IMAGES)
        for place, image in enumerate(IMAGES):
            (tmp_path / shop / image).write_bytes(image_bytes(size=(16 + number, 32 + place)))
    return tmp_path


def named(root, names):
    return tuple(f"folder:{root}/{name}" for name in names)


def union(root, names=("north", "south"), test=()):
    return read_split(DatasetsConfig(NAMES=named(root, names), TEST=named(root, test)))


def test_equal_names_in_two_sets_are_two_persons_and_two_cameras(shops):
    split = union(shops)
    assert (split.num_persons, split.num_cameras, len(split.train)) == (4, 4, 8)
    assert [split.person_names[person] for person in split.persons] == ["north/1", "north/2", "south/1", "south/2"]
    assert split.names_of_cameras == ["north/1", "north/2", "south/1", "south/2"]
    assert [test.label for test in split.tests] == ["north", "south"]
    assert {test.person_names[test.query[0].person] for test in split.tests} == {"3"}
    alone = read_split(DatasetsConfig(NAMES=f"folder:{shops}/north"))
    assert alone == read_split(DatasetsConfig(NAMES="folder", ROOT_DIR=str(shops / "north")))


def test_a_set_is_tested_on_without_being_trained_on_and_every_file_is_counted(shops):
    split = union(shops, ("north",), ("south",))
    assert split.names_of_cameras == ["1", "2"], "names of the only set to train on stay as they are"
    assert ({*split.left_out}, split.found, split.verdict) == ({UNTRAINED, UNTESTED}, 12, "ok")
    account = account_as_json(split)
    assert (account["parts"], account["verdict"]) == ({"train": 4, "query": 1, "gallery": 1}, "ok")
    assert account["persons"] == ["1", "2", "south/3"]
    assert f"folder in {shops}/south\n" in split.describe()
    assert f"north + south in {shops}\n" in split.describe()


def test_bad_images_are_found_by_the_index_of_each_set(shops):
    spoilt = shops / "south/query/3/c1.jpg"
    make(shops / "south", "query/4/c1.jpg", "gallery/4/c2.jpg")
    for name in ("query/4/c1.jpg", "gallery/4/c2.jpg"):
        (shops / "south" / name).write_bytes(image_bytes(size=(16, 80 + len(name))))
    spoilt.write_bytes(JPEG[:-9])
    with pytest.raises(DataError, match=f"1 of 14 image files cannot be used:\n  {spoilt}"):
        BadImages("error").check(union(shops))
    split = BadImages("skip").check(union(shops))
    assert [len(test.query) for test in split.tests] == [1, 1]
    assert all((shops / shop / FILE).is_file() for shop in ("north", "south"))
    (shops / "south/train/1/c1.jpg").write_bytes((shops / "north/train/2/c1.jpg").read_bytes())
    (shops / "south/gallery/4/c2.jpg").write_bytes((shops / "north/train/1/c2.jpg").read_bytes())
    warnings = "\n".join(BadImages("skip").check(union(shops)).warnings)
    assert "1 images in train are given to two persons" in warnings
    assert "(north/2)" in warnings
    assert "1 test images are in train too" in warnings


def test_a_set_or_an_image_that_is_there_twice_is_refused(shops):
    (shops / "list.csv").write_text("path,person,camera,split\nnorth/train/1/c1.jpg,1,1,train\n"
                                    "north/query/3/c1.jpg,3,1,query\nnorth/gallery/3/c2.jpg,3,2,gallery\n")  # fmt: skip
    both = [f"folder:{shops}/north", f"csv:{shops}/list.csv"]
    with pytest.raises(DataError, match=r"north and list both train on .*c1.jpg"):
        read_split(DatasetsConfig(NAMES=both))
    make(shops, *(f"other/north/{image}" for image in IMAGES))
    with pytest.raises(DataError, match="two data sets are called north"):
        union(shops, ("north", "other/north"))


def test_balanced_sets_fill_equal_parts_of_every_batch():
    sizes = {0: 40, 1: 6}  # persons of 4 images
    labels = np.repeat(np.arange(46), 4)
    sets = np.repeat([0, 1], [4 * size for size in sizes.values()])
    options = {"persons_per_batch": 4, "instances": 2, "seed": 1, "height": 32, "width": 16, "sets": sets}
    first, second = (epoch_plan(labels, epoch=epoch, **options) for epoch in (1, 2))
    assert first.num_steps == second.num_steps == 23
    of_step = labels[first.image].reshape(23, 4, 2)
    assert (of_step == of_step[:, :, :1]).all()
    assert (sets[first.image].reshape(23, 4, 2)[:, :, 0] == [0, 1, 0, 1]).all()
    assert all(len({*persons}) == 4 for persons in of_step[:, :, 0].tolist())
    uses = np.bincount(first.image)
    assert uses[sets == 0].max() == 1
    assert uses[sets == 1].min() >= 2, "the smaller set starts anew when it is used up"
    of_smaller = first.image.reshape(23, 4, 2)[:, 1::2].reshape(23, 4).tolist()
    assert len({*map(tuple, of_smaller)}) > 12, "each time in another order; a pass has 6 steps at most"
    assert (first.image != second.image).any()


def test_a_batch_that_sets_cannot_share_is_refused(shops):
    split = union(shops)
    with pytest.raises(DataError, match=r"SOLVER.IMS_PER_BATCH must be a multiple of 4, got 6"):
        check_batch(split, 6, 2, balance=True)
    with pytest.raises(DataError, match=r"north has 2 persons .* at most 8 here"):
        check_batch(split, 12, 2, balance=True)
    check_batch(split, 8, 2, balance=True)
    (shops / "south/train").rename(shops / "untrained")
    with pytest.raises(DataError, match="south: no images for train"):
        check_batch(union(shops), 4, 2)
