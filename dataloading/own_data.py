"""Own data as people have it, a folder or a list of any layout, to a split that can be trained on.

Persons are divided at random, by a seed, into those to train on and those to test with.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets import csv_list, market1501
from fusionreid.dataloading.datasets.assemble import assemble
from fusionreid.dataloading.datasets.divide import TEST, divide, divide_test
from fusionreid.dataloading.datasets.layouts import LOOSE, Found, read_folders, unwrapped
from fusionreid.dataloading.datasets.names import is_nobody
from fusionreid.dataloading.datasets.settle import settle
from fusionreid.dataloading.image_files import find_files
from fusionreid.dataloading.records import DataError, LeftOut, Split, printable

STEPS = 4_000  # that a training takes at least, within these epochs
EPOCHS = (20, 120)
BATCH = 64
LAYOUT = """\
  a folder per person: <person>/<image>, <person>/<camera>/<image> or <camera>/<person>/<image>
  or images named <person>_c<camera>_<number>.jpg
  or train and test, or train, query and gallery, with such folders
  or a CSV file with the columns path and person, camera and split if they are known"""


class OwnData(NamedTuple):
    """A sound split, how it came about in a line per decision, and what its owner must settle before a training."""

    split: Split
    decisions: tuple[str, ...]
    divided: bool  # here, into train and test
    faults: tuple[str, ...] = ()  # what they are about is left out of the split


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
        rows, columns, faults = csv_list.read_rows(path, ("path", "person"), {*csv_list.VALUES, TEST})
        decision = "read as a list" + (f": {columns}" if columns else "")
        return _complete("csv", path, Found(rows, {}, [decision], [], faults), seed)
    if not path.is_dir():
        raise DataError(f"there is no folder and no list {printable(path)}\nexpected:\n{LAYOUT}")
    files, left_out = find_files(path)
    base = unwrapped(path, files)
    if any((base / mark).is_dir() for mark in market1501.MARKS):
        return _market(path, base, files, left_out)
    found = read_folders(base, files, left_out)
    if not found.rows:
        raise market1501.layout_error(f"no images of persons in {printable(path)}", LAYOUT, path, found.left_out)
    return _complete("folder", path, found, seed)


def _market(path: Path, base: Path, files: Sequence[str], left_out: LeftOut) -> OwnData:
    """Read the layout of Market-1501 in `base`; what lies elsewhere below `path` is accounted for too."""
    split = market1501.read_own(DatasetsConfig(ROOT_DIR=str(base)))
    if not split.train:
        raise _nothing_to_train(path)
    elsewhere = {LOOSE: [file for file in files if not file.startswith(f"{base}{os.sep}")], **left_out}
    account = {reason: {*split.left_out.get(reason, ()), *paths} for reason, paths in elsewhere.items() if paths}
    split = replace(split, left_out={**split.left_out, **{reason: tuple(sorted(p)) for reason, p in account.items()}})
    return OwnData(split, ("the layout of Market-1501",), False)


def _complete(name: str, path: Path, found: Found, seed: int) -> OwnData:
    """Settle what is unclear, divide what is not divided yet, and check it all."""
    left_out, decisions = dict(found.left_out), [*found.decisions]
    zero_is_nobody = any(is_nobody(row.person) for row in found.rows)  # as in Market-1501
    rows, unclear, warnings = settle(found.rows, left_out)
    faults = (*found.faults, *(f"{name}: {fault}" for fault in unclear))
    if warnings:
        decisions.append("cameras are not used, since many images name none")
    try:
        if not rows:
            raise DataError(f"{name}: no usable images in {printable(path)}")
        if any(row.part == TEST for row in rows):
            rows, told = divide_test(rows, seed)
            decisions += told
        parts = {row.part for row in rows}
        if divided := parts <= {"", "train"}:
            rows, told = divide(str(path), rows, seed, zero_is_nobody=zero_is_nobody)
            decisions += told
        elif "train" not in parts:
            raise _nothing_to_train(path)
        split = assemble(name, str(path), rows, left_out, warnings=[*found.warnings, *warnings])
    except DataError as error:
        raise DataError("\n".join([*faults, str(error)])) from error
    return OwnData(split, tuple(decisions), divided, faults)


def _nothing_to_train(path: Path) -> DataError:
    return DataError(
        f"{printable(path)} has a query and a gallery, and nothing to train on: add a part train; to measure a model "
        f"on it, give evaluate its configuration with DATASETS.NAMES and DATASETS.ROOT_DIR {printable(path)}"
    )


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
        f"SOLVER.MAX_EPOCHS {epochs}: about {steps} step{'' if steps == 1 else 's'} each, {epochs * steps:,} in all",
    )
    return Sizes(batch, instances, epochs, reasons)
