"""The queries of a report: which are chosen, what is said of each, under which names, and how a picture is lit."""

import base64
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fusionreid.dataloading import Record, Split
from fusionreid.engine.evaluation.names import Names
from fusionreid.engine.reporting.queries import (
    DARKEST,
    THUMBNAIL,
    camera_name,
    choose_queries,
    confusions,
    describe_queries,
    light,
    person_name,
    thumbnail,
)

NAN = float("nan")


@pytest.fixture
def split(tmp_path: Path) -> Split:
    def records(part: str, *who: tuple[int, int]) -> tuple[Record, ...]:
        paths = [str(tmp_path / f"{part}{i}.png") for i in range(len(who))]
        for i, path in enumerate(paths):
            Image.new("RGB", (64, 128), (40 * i, 90, 120)).save(path)
        return tuple(Record(path, *pair) for path, pair in zip(paths, who))

    gallery = records("gallery", (1, 0), (1, 1), (2, 1), (0, 2))
    names = {0: "0000", 1: "Anna", 2: "0031"}, {0: "front door", 1: "7"}
    return Split("own", str(tmp_path), (), records("query", (1, 0), (2, 0)), gallery, "", {}, (), *names)


def test_best_median_and_worst_queries_are_chosen() -> None:
    precision = np.array([0.2, NAN, 0.9, 0.5, 0.4, 0.6, 0.1])
    assert choose_queries(precision, 1) == {2: "best", 3: "median", 6: "worst"}
    assert list(choose_queries(precision).items()) == [
        *((2, "best"), (5, "best"), (3, "median"), (4, "median"), (0, "worst"), (6, "worst"))
    ]


@pytest.mark.parametrize("count", range(6))
def test_of_few_queries_each_is_chosen_once(count: int) -> None:
    precision = np.array([NAN, *np.linspace(1, 0.5, count)])
    chosen = choose_queries(precision)
    assert list(chosen) == list(range(1, count + 1))
    assert set(chosen.values()) <= {"best", "median", "worst"}


def test_queries_have_the_names_their_owner_wrote(split: Split) -> None:
    nearest, scores = np.array([[1, 2, -1], [3, 2, 0]]), np.array([[0.9, 0.5, NAN], [0.8, 0.7, 0.6]])
    maps = {"map": torch.eye(2)[None].expand(2, 2, 2)}
    first, second = describe_queries(split, {0: "best", 1: "worst"}, np.array([1.0, 0.5]), nearest, scores, maps)
    assert (first["person"], first["camera"], first["kind"], first["average_precision"]) == (
        *("Anna", "front door", "best", 1.0),
    )
    assert [(f["person"], f["camera"], f["score"], f["right"]) for f in first["found"]] == [
        ("Anna", "7", 0.9, True),
        ("0031", "7", 0.5, False),
    ]
    assert [(f["person"], f["camera"], f["right"]) for f in second["found"]] == [
        ("0000 (distractor)", "3", False),
        ("0031", "7", True),
        ("Anna", "front door", False),
    ]
    pictures = [first["picture"], first["found"][0]["picture"], first["maps"]["map"]]
    opened = [Image.open(BytesIO(base64.b64decode(picture))) for picture in pictures]
    assert [(picture.format, picture.size) for picture in opened] == [("JPEG", THUMBNAIL)] * 3
    assert abs(opened[1].getpixel((5, 5))[0] - 40) < 4, "gallery image 1"


def test_names_that_nobody_wrote_are_numbers() -> None:
    assert (person_name(Names(), 31), camera_name(Names(), 0)) == ("31", "1")
    assert person_name(Names({1: "a\n\udcff"}), 1) == r"a\n\xff"


def test_confusions_count_the_persons_found_first(split: Split) -> None:
    assert confusions(split, np.array([[1], [3]])) == [
        {"person": "0031", "taken_for": "0000 (distractor)", "queries": 1, "of": 1}
    ]
    assert confusions(split, np.array([[1], [2]])) == []
    assert confusions(split, np.array([[1], [-1]])) == [], "a query that finds nothing is not confused"


def test_a_picture_keeps_its_proportions(tmp_path: Path) -> None:
    Image.new("L", (300, 100)).save(tmp_path / "wide.png")
    picture = thumbnail(Record(str(tmp_path / "wide.png"), 1, 0))
    assert (picture.size, picture.mode) == ((96, 32), "RGB")


def test_a_picture_is_lit_where_the_map_is_largest() -> None:
    picture = Image.new("RGB", (64, 128), (200, 100, 50))
    lit = light(picture, np.array([[0.4, 0], [0, 0], [0, 0], [0, 0]]))
    assert lit.getpixel((1, 1)) == (200, 100, 50)
    assert lit.getpixel((62, 126)) == tuple(round(DARKEST * value) for value in (200, 100, 50))
    dark = light(picture, np.zeros((4, 2)))
    assert dark.getpixel((1, 1)) == lit.getpixel((62, 126)), "a map that is 0 everywhere"
