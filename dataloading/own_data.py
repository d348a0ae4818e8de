"""Own data as people have it, a folder or a list of any layout, to a split that can be trained on.

Persons are divided at random, by a seed, into those to train on and those to test with. The list that comes with the
split reproduces it as DATASETS.NAMES csv.
"""

import csv
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets import csv_list, folder, market1501
from fusionreid.dataloading.datasets.assemble import DISTRACTOR, NOBODY, Row, assemble
from fusionreid.dataloading.datasets.levels import find_levels_of_one
from fusionreid.dataloading.datasets.names import camera_key, person_key
from fusionreid.dataloading.image_files import find_files
from fusionreid.dataloading.records import PARTS, DataError, LeftOut, Split, printable
from fusionreid.files import atomic_write

TEST_SHARE = 4  # one person in so many is for the test
NAMED = 0.9  # share of images whose name must tell person and camera
STEPS = 4_000  # that a training takes at least, within these epochs
EPOCHS = (20, 120)
BATCH = 64
NAME_OF_CAMERA = re.compile(r"(.+?)[ _-]+\d+")  # <camera>_<number>
LOOSE = "in no person's folder, and its name does not begin with <person>_c<camera>"
LAYOUT = """\
  a folder per person: <person>/<image>, <person>/<camera>/<image> or <camera>/<person>/<image>
  or images named <person>_c<camera>_<number>.jpg; or train, query and gallery with such folders
  or a CSV file with the columns path and person, camera and split if they are known"""


class OwnData(NamedTuple):
    """A split, how it came about in a line per decision, and whether it was divided here."""

    split: Split
    decisions: tuple[str, ...]
    divided: bool


class Sizes(NamedTuple):
    """Settings that fit a split, with the reason for each."""

    batch: int
    instances: int
    epochs: int
    reasons: tuple[str, ...]


def read_own_data(path: str | Path, seed: int = 0) -> OwnData:
    """Read any folder or list; persons are divided into train and test by `seed` where they are not yet."""
    path = Path(path).expanduser().absolute()
    if path.is_file():
        rows, divided = csv_list.read_rows(path, ("path", "person"))
        if divided:
            return OwnData(assemble("csv", str(path), rows, {}), ("the list says the split",), False)
        return _divided("csv", path, rows, {}, ["a list without a split"], seed)
    if not path.is_dir():
        raise DataError(f"there is no folder and no list {printable(path)}\nexpected:\n{LAYOUT}")
    cfg = DatasetsConfig(ROOT_DIR=str(path))
    if any((path / mark).is_dir() for mark in market1501.MARKS):
        return OwnData(market1501.read_own(cfg), ("the layout of Market-1501",), False)
    if all((path / part).is_dir() for part in PARTS):
        return OwnData(folder.read(cfg), ("the folders train, query and gallery",), False)
    files, left_out = find_files(path)
    rows, decision = _rows(path, files, left_out)
    if not rows:
        raise market1501.layout_error(f"no images of persons in {printable(path)}", LAYOUT, path, left_out)
    return _divided("folder", path, rows, left_out, [decision], seed)


def _rows(root: Path, files: Sequence[str], left_out: LeftOut) -> tuple[list[Row], str]:
    """Take person and camera of every image from names of files or folders; also how."""
    names = {path: market1501.OWN_NAME.match(os.path.basename(path)) for path in files}
    if sum(match is not None for match in names.values()) >= NAMED * len(files):
        rows = [Row(path, match[1], str(int(match[2])), "") for path, match in names.items() if match]
        left_out.setdefault(LOOSE, []).extend(path for path, match in names.items() if not match)
        decision = "person and camera from names of files: <person>_c<camera>"
    else:
        folders = {path: tuple(path.removeprefix(f"{root}{os.sep}").split(os.sep)[:-1]) for path in files}
        levels = find_levels_of_one([*folders.values()])
        left_out.setdefault(LOOSE, []).extend(path for path in files if len(folders[path]) <= levels.person)
        inside = [path for path in files if len(folders[path]) > levels.person]
        cameras = [folder.camera_of(path, folders[path], levels) for path in inside]
        if levels.camera is None and not any(cameras):
            cameras = _prefixes(inside)
        if None in cameras and any(cameras):
            cameras = [None] * len(cameras)
        rows = [Row(p, folders[p][levels.person], camera, "") for p, camera in zip(inside, cameras)]
        where = "folders" if levels.camera is not None else "names of files" if any(cameras) else "nowhere"
        decision = f"persons from folders, cameras from {where}" + (f"; {levels.why}" if levels.why else "")
    if not left_out[LOOSE]:
        del left_out[LOOSE]
    return rows, decision


def _prefixes(paths: Iterable[str]) -> list[str | None]:
    """Take cameras from names such as hall_0001.jpg, if several persons share them."""
    found = [NAME_OF_CAMERA.fullmatch(os.path.splitext(os.path.basename(path))[0]) for path in paths]
    persons = defaultdict(set)
    for path, match in zip(paths, found):
        persons[match[1] if match else None].add(os.path.dirname(path))
    shared = None not in persons and len(persons) > 1 and all(len(folders) > 1 for folders in persons.values())
    return [match[1] if match and shared else None for match in found]


def _divided(name: str, path: Path, rows: list[Row], left_out: LeftOut, decisions: list[str], seed: int) -> OwnData:
    """Put all images of a person in train, or in query and gallery."""
    by_person: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for position, row in enumerate(rows):
        by_person[person_key(row.person)][camera_key(row.camera or "")].append(position)
    nobody = by_person.pop(DISTRACTOR, {}) if by_person.pop(NOBODY, None) else {}  # Market-1501's two kinds of both
    if not any(len(cameras) > 1 for cameras in by_person.values()):
        if any(row.camera for row in rows):
            decisions.append("no person was taken by two cameras, so that cameras are not used")
        rows = [row._replace(camera=None) for row in rows]
        by_person = {person: {"": sorted(chain(*found.values()))} for person, found in by_person.items()}
    fit = sorted(p for p, cameras in by_person.items() if len(cameras) > 1 or len(cameras.get("", ())) > 1)
    count = min(max(2, len(by_person) // TEST_SHARE), len(fit), len(by_person) - 2)
    if count < 1:
        raise DataError(
            f"{printable(path)} shows {len(by_person)} persons, {len(fit)} of them twice; at least 3 persons are "
            "needed, of whom one was taken by two cameras, or twice"
        )
    rng = np.random.default_rng(seed)
    tested = [fit[i] for i in rng.permutation(len(fit))[:count]]
    parts = dict.fromkeys(range(len(rows)), "train") | dict.fromkeys(chain(*nobody.values()), "gallery")
    for person in tested:
        parts |= _query_and_gallery(by_person[person], rng)
    divided = [row._replace(part=parts[position]) for position, row in enumerate(rows)]
    decisions.append(f"{len(by_person) - count} persons to train on, {count} to test with, drawn with seed {seed}")
    return OwnData(assemble(name, str(path), divided, left_out), tuple(decisions), True)


def _query_and_gallery(cameras: dict[str, list[int]], rng: np.random.Generator) -> dict[int, str]:
    """Make one image of every camera that took several a query, or else one image in all."""
    parts = {position: "gallery" for positions in cameras.values() for position in positions}
    several = [positions for _, positions in sorted(cameras.items()) if len(positions) > 1]
    for positions in several or [cameras[min(cameras)]]:
        parts[positions[int(rng.integers(len(positions)))]] = "query"
    return parts


def write_list(split: Split, file: Path) -> None:
    """Write the list that reproduces a split as DATASETS.NAMES csv, paths absolute."""
    with atomic_write(file, "w", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(csv_list.COLUMNS)
        for part in PARTS:
            for record in getattr(split, part):
                person, camera = split.person_names[record.person], split.camera_names[record.camera]
                rows.writerow([record.path, person, camera, part])


def fit_sizes(split: Split) -> Sizes:
    """Choose batch, images per person and epochs for the images and persons there are."""
    counts: dict[int, int] = defaultdict(int)
    for record in split.train:
        counts[record.person] += 1
    usual = int(median(counts.values()))
    instances = max(k for k in (2, 4, 8) if k <= max(2, usual))
    persons = max(2, min(BATCH // instances, split.num_persons))
    batch = persons * instances
    steps = max(1, len(split.train) // batch)
    epochs = min(max(-(-STEPS // steps), EPOCHS[0]), EPOCHS[1])
    reasons = (
        f"DATALOADER.NUM_INSTANCE {instances}: half of the persons have {usual} images or fewer",
        f"SOLVER.IMS_PER_BATCH {batch}: {persons} persons with {instances} images each, of {split.num_persons}",
        f"SOLVER.MAX_EPOCHS {epochs}: about {steps} steps each, {epochs * steps:,} in all",
    )
    return Sizes(batch, instances, epochs, reasons)
