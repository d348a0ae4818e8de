"""Division of own data by persons into train, query and gallery, by a seed."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import chain

import numpy as np

from fusionreid.dataloading.datasets.assemble import Row
from fusionreid.dataloading.datasets.names import camera_key, is_distractor, person_key
from fusionreid.dataloading.records import DataError, printable

TEST_SHARE = 4  # one person in so many is for the test
TEST = "test"  # the part of rows that are neither query nor gallery yet
Cameras = dict[str, list[int]]  # camera -> positions of the rows of one person


def divide(path: str, rows: Sequence[Row], seed: int, *, zero_is_nobody: bool) -> tuple[list[Row], list[str]]:
    """Put all images of a person in train, or in query and gallery; also how, in a line per decision.

    `zero_is_nobody`: person 0 is a distractor, as in Market-1501. DataError: there are too few persons.
    """
    rows, decisions = _with_useful_cameras(rows)
    by_person = _by_person(rows)
    nobody = [name for name in by_person if is_distractor(name) or (zero_is_nobody and name == "0")]
    aside = list(chain.from_iterable(chain(*by_person.pop(name).values()) for name in nobody))
    fit = sorted(p for p, cameras in by_person.items() if len(cameras) > 1 or len(cameras.get("", ())) > 1)
    count = min(max(2, len(by_person) // TEST_SHARE), len(fit), len(by_person) - 2)
    if count < 1:
        raise DataError(
            f"{printable(path)} shows {len(by_person)} persons, {len(fit)} of them twice; at least 3 persons are "
            "needed, of whom one was taken by two cameras, or twice"
        )
    rng = np.random.default_rng(seed)
    tested = [fit[i] for i in rng.permutation(len(fit))[:count]]
    parts = dict.fromkeys(range(len(rows)), "train") | dict.fromkeys(aside, "gallery")
    for person in tested:
        parts |= _query_and_gallery(by_person[person], rng)
    decisions.append(f"{len(by_person) - count} persons to train on, {count} to test with, drawn with seed {seed}")
    return [row._replace(part=parts[position]) for position, row in enumerate(rows)], decisions


def divide_test(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[str]]:
    """Divide the rows of the part TEST into query and gallery; if they show persons of train, undo the division."""
    persons: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        persons[row.part].add(person_key(row.person))
    both = persons["train"] & persons[TEST]
    if 2 * len(both) > len(persons[TEST]):
        text = f"{len(both)} of {len(persons[TEST])} persons to test with are in train too: split again, by person"
        return [row._replace(part="") for row in rows], [text]
    rng = np.random.default_rng(seed)
    parts: dict[int, str] = {}
    for cameras in _by_person(rows, (TEST,)).values():
        parts |= _query_and_gallery(cameras, rng)
    divided = [row._replace(part=parts.get(position, row.part)) for position, row in enumerate(rows)]
    count = sum(part == "query" for part in parts.values())
    return divided, [f"{len(persons[TEST])} persons to test with: {count} images are queries, drawn with seed {seed}"]


def _with_useful_cameras(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Forget cameras that never took the same person, since no query could have a match."""
    if any(len(cameras) > 1 for cameras in _by_person(rows).values()):
        return list(rows), []
    told = ["no person was taken by two cameras, so that cameras are not used"] if any(r.camera for r in rows) else []
    return [row._replace(camera=None) for row in rows], told


def _by_person(rows: Sequence[Row], parts: Collection[str] = ()) -> dict[str, Cameras]:
    """Collect the positions of rows by person and camera, of these parts or of all."""
    found: dict[str, Cameras] = defaultdict(lambda: defaultdict(list))
    for position, row in enumerate(rows):
        if not parts or row.part in parts:
            found[person_key(row.person)][camera_key(row.camera or "")].append(position)
    return found


def _query_and_gallery(cameras: Cameras, rng: np.random.Generator) -> dict[int, str]:
    """Make one image of every camera that took several a query, or else one image in all."""
    parts = {position: "gallery" for positions in cameras.values() for position in positions}
    several = [positions for _, positions in sorted(cameras.items()) if len(positions) > 1]
    for positions in several or [cameras[min(cameras)]]:
        parts[positions[int(rng.integers(len(positions)))]] = "query"
    return parts
