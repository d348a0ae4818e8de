"""A list of images to search with: a CSV file with a column path, and track, person and camera where they are known."""

import csv
import os
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from fusionreid.dataloading.datasets import csv_list
from fusionreid.dataloading.image_files import read_file
from fusionreid.dataloading.records import DataError, printable

SUFFIXES = {".csv", ".tsv"}
TRACK = ("track", "trackid", "tracklet", "trackletid", "tid")
DELIMITERS = ",;\t|"
EXPECTED = "path,track,person,camera, of which path must be there; paths are relative to the folder of the list"


class Listed(NamedTuple):
    """One line of a list; empty texts where it says nothing."""

    path: str  # absolute
    track: str
    person: str
    camera: str


def is_list(path: Path) -> bool:
    """Tell whether a path names a list and no image."""
    return path.suffix.lower() in SUFFIXES


def read_image_list(file: Path) -> list[Listed]:
    """Read a list; DataError names the line that cannot be used."""
    try:
        text = read_file(str(file)).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"the list {printable(file)} cannot be read: {error.strerror}") from error
    first = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=lambda d: len(_columns(first.split(d))))
    lines = csv.reader(StringIO(text), delimiter=delimiter, skipinitialspace=True)
    header = next(lines, [])
    columns = _columns(header)
    if "path" not in columns:
        raise DataError(f"{printable(file)} has no column path, its first line is {header!r}; expected: {EXPECTED}")
    listed = []
    for cells in lines:
        if any(map(str.strip, cells)):
            given = {name: cells[at].strip() if at < len(cells) else "" for name, at in columns.items()}
            if not given["path"]:
                raise DataError(f"{printable(file)}, line {lines.line_num}: path must not be empty, got {cells!r}")
            path = os.path.join(file.absolute().parent, os.path.expanduser(given["path"]))
            listed.append(Listed(path, *(given.get(name, "") for name in Listed._fields[1:])))
    if not listed:
        raise DataError(f"{printable(file)} lists no images; expected: {EXPECTED}")
    return listed


def _columns(cells: Sequence[str]) -> dict[str, int]:
    """Return the position of every known column."""
    plain = [re.sub("[^a-z0-9]", "", cell.casefold()) for cell in cells]
    known = {**{name: csv_list.COLUMNS[name] for name in ("path", "person", "camera")}, "track": TRACK}
    found = {column: next((name for name in names if name in plain), None) for column, names in known.items()}
    return {column: plain.index(name) for column, name in found.items() if name}
