"""Market-1501, and any data set in its layout: three folders, person and camera in the file name."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets.assemble import Published, Row, assemble
from fusionreid.dataloading.datasets.names import person_key
from fusionreid.dataloading.image_files import find_files
from fusionreid.dataloading.records import DataError, LeftOut, Split, printable

PARTS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
FOLDERS = {folder: part for part, folder in PARTS.items()}
MARKS = ("bounding_box_train", "bounding_box_test")  # one of them tells a data set from any other folder
FILE_NAME = re.compile(r"(-?\d+)_c(\d+)")
OWN_NAME = re.compile(r"(.+?)[_-]c(?:am|amera)?[_-]?(\d+)", re.IGNORECASE)
COUNTS = (12_936, 3_368, 15_913)  # without junk
NAMED = 10
LAYOUT = """\
  bounding_box_train/0002_c1s1_000451_03.jpg    person 2, camera 1
  query/0001_c1s1_001051_00.jpg
  bounding_box_test/0000_c1s1_000151_01.jpg     person 0: distractor; person -1: junk, left out"""


def read(cfg: DatasetsConfig) -> Split:
    """Read Market-1501, found by its usual folder names in or below DATASETS.ROOT_DIR."""
    folder = find_folder(cfg.ROOT_DIR, "market1501", MARKS, LAYOUT)
    return compare(read_layout(folder, "market1501", published=Published(cameras=6)), COUNTS)


def read_own(cfg: DatasetsConfig) -> Split:
    """Read own data with Market-style names, right in DATASETS.ROOT_DIR."""
    return read_layout(find_folder(cfg.ROOT_DIR, None, MARKS, LAYOUT), "market")


def read_layout(folder: Path, name: str, note: str = "", published: Published | None = None) -> Split:
    """Read the three folders of the Market-1501 layout in `folder`."""
    folder = folder.absolute()
    for part, subfolder in PARTS.items():
        if part != "train" and not (folder / subfolder).is_dir():
            raise layout_error(f"{name}: no folder {subfolder} in {printable(folder)}", LAYOUT, folder)
    paths, left_out = find_files(folder)
    rows: list[Row] = []
    unnamed: list[str] = []
    spelling: dict[str, str] = {}  # of a person, as it was first written
    for path in paths:
        place, *below = path.removeprefix(f"{folder}{os.sep}").split(os.sep)
        match = (FILE_NAME if published else OWN_NAME).match(below[-1]) if below else None
        if place not in FOLDERS or len(below) != 1:
            left_out.setdefault(_misplaced(place, below), []).append(path)
        elif match is None or (published and match[2].strip("0") == ""):
            unnamed.append(path)
        else:
            person = spelling.setdefault(person_key(match[1]), match[1])
            rows.append(Row(path, person, str(int(match[2])), FOLDERS[place]))
    if unnamed:
        raise _unnamed(name, unnamed)
    for part in ("query", "gallery"):
        if not any(row.part == part for row in rows):
            where = folder / PARTS[part]
            raise layout_error(f"{name}: no images in {printable(where)}", LAYOUT, where)
    return assemble(name, str(folder), rows, left_out, note=note, published=published)


def _misplaced(place: str, below: Sequence[str]) -> str:
    if place not in FOLDERS:
        return f"outside the folders {', '.join(FOLDERS)}"
    return f"in a folder inside {place}"


def _unnamed(name: str, paths: Sequence[str]) -> DataError:
    more = f"\n  and {len(paths) - NAMED:,} more" if len(paths) > NAMED else ""
    listed = "\n".join(f"  {printable(path)}" for path in paths[:NAMED])
    return DataError(
        f"{name}: the name of an image must begin with <person>_c<camera>, cameras counted from 1; rename these or "
        f"take them out:\n{listed}{more}"
    )


def find_folder(root_dir: str, prefix: str | None, marks: Sequence[str], layout: str) -> Path:
    """Return the folder that holds one of `marks`: `root_dir`, or one at most two levels below named `prefix`*.

    Case and punctuation do not count: "Market-1501-v15.09.15" begins with "market1501".
    """
    root = Path(root_dir).expanduser().absolute()
    if not root.is_dir():
        raise layout_error(f"DATASETS.ROOT_DIR: no folder {printable(root)}", layout, None)
    level, found = [root], []
    for _ in range(3):
        found = [folder for folder in level if any((folder / mark).exists() for mark in marks)]
        if found or prefix is None:
            break
        level = [child for folder in level for child in sorted(folder.iterdir()) if _begins(child, prefix)]
    if len(found) > 1:
        several = ", ".join(printable(folder) for folder in found)
        raise DataError(f"DATASETS.ROOT_DIR: {printable(root)} holds several copies ({several}); name one of them")
    if not found:
        where = f"in {printable(root)}" + (f" or in a folder {prefix}* below it" if prefix else "")
        raise layout_error(f"DATASETS.ROOT_DIR: no {' or '.join(marks)} {where}", layout, root)
    return found[0]


def _begins(folder: Path, prefix: str) -> bool:
    return re.sub("[^a-z0-9]", "", folder.name.lower()).startswith(prefix) and folder.is_dir()


def layout_error(problem: str, layout: str, looked_in: Path | None, left_out: LeftOut | None = None) -> DataError:
    """Compose the problem, the layout expected, and what is there instead."""
    lines = [problem, "expected:", layout]
    if looked_in is not None and looked_in.is_dir():
        names = sorted(entry.name for entry in os.scandir(looked_in))
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"found in {printable(looked_in)}: {', '.join(map(printable, names[:NAMED])) or 'nothing'}{more}")
    for reason, paths in (left_out or {}).items():
        lines.append(f"left out: {len(paths):,}: {reason}, such as {printable(paths[0])}")
    return DataError("\n".join(lines))


def compare(split: Split, published: tuple[int, int, int]) -> Split:
    """Add a warning where the counts of images are not the published ones."""
    counts = len(split.train), len(split.query), len(split.gallery)
    if counts == published:
        return split
    pairs = (f"{part} {count:,} ({known:,})" for part, count, known in zip(PARTS, counts, published))
    warning = f"not the published set; images here (published): {', '.join(pairs)}"
    return replace(split, warnings=(*split.warnings, warning))
