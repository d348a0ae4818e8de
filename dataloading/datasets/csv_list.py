"""Own data in a list: a CSV file that names path, person, camera and split of every image."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets.assemble import Row, assemble
from fusionreid.dataloading.records import DataError, Split, printable

COLUMNS = {  # what a column may be called, the first name being the usual one; only letters and digits count
    "path": ("path", "file", "filename", "filepath", "image", "imagepath", "imagename", "img", "imgpath", "crop"),
    "person": ("person", "personid", "pid", "identity", "id", "subject", "label", "name"),
    "camera": ("camera", "cameraid", "cam", "camid", "cameraname"),
    "split": ("split", "part", "set", "subset", "partition", "phase", "usage"),
}
VALUES = {
    "train": ("train", "training", "boundingboxtrain"),
    "query": ("query", "queries", "probe"),
    "gallery": ("gallery", "boundingboxtest"),
}
PART = {value: part for part, values in VALUES.items() for value in values}
DELIMITERS = ",;\t|"
FAULTS = 20  # told in one run
LAYOUT = """\
  DATASETS.ROOT_DIR names a CSV file, paths are relative to its folder:
  path,person,camera,split
  crops/0001.jpg,anna,entrance,train       split: train, query or gallery; the column camera may be missing"""


def read(cfg: DatasetsConfig) -> Split:
    """Read the list DATASETS.ROOT_DIR."""
    file = Path(cfg.ROOT_DIR).expanduser().absolute()
    rows, _ = read_rows(file, ("path", "person", "split"))
    return assemble("csv", str(file), rows, {})


def read_rows(file: Path, needed: Sequence[str]) -> tuple[list[Row], bool]:
    """Read the rows of a list that has at least the columns `needed`; also whether it says the split.

    Without a split the part of every row is empty.
    """
    if not file.is_file():
        raise DataError(f"csv: no file {printable(file)}\nexpected:\n{LAYOUT}")
    lines = _text(file.read_bytes()).splitlines(keepends=True)
    start, delimiter, columns, width = _header(file, lines, needed)
    rows, faults = [], []
    for number, cells in _records(lines, start, delimiter):
        if isinstance(cells, str):
            faults.append(f"  line {number}: {cells}")
        elif any(cell.strip() for cell in cells):
            row, fault = _row(file, cells, columns, width)
            rows += [row] if row else []
            faults += [f"  line {number}: {fault}"] if fault else []
        if len(faults) > FAULTS:
            break
    if faults:
        more = "\n  and more" if len(faults) > FAULTS else ""
        raise DataError("\n".join([f"csv: {printable(file)} has rows that cannot be used:", *faults[:FAULTS]]) + more)
    return rows, "split" in columns


def _text(data: bytes) -> str:
    """Decode UTF-8 or UTF-16, with or without its mark; other bytes stay what they are in the names of files."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    if b"\0" in (start := data[:1000]):
        little = start[1::2].count(0) >= start[::2].count(0)
        return data.decode("utf-16-le" if little else "utf-16-be", "replace")
    return data.decode("utf-8-sig", "surrogateescape")


def _header(file: Path, lines: list[str], needed: Sequence[str]) -> tuple[int, str, dict[str, int], int]:
    """Return the line after the header, the delimiter, the position of every known column, the number of columns."""
    first = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    delimiters = DELIMITERS
    if match := re.fullmatch(r"sep=(.)\s*", lines[first] if first < len(lines) else "", re.IGNORECASE):
        first, delimiters = first + 1, match[1]
    line = lines[first] if first < len(lines) else ""
    readings = [(delimiter, _cells(line, delimiter)) for delimiter in delimiters]
    delimiter, cells = max(readings, key=lambda reading: len(_columns(reading[1])))
    columns = _columns(cells)
    if missing := [column for column in needed if column not in columns]:
        raise DataError(
            f"csv: {printable(file)} lacks {', '.join(missing)} in its header, which has "
            f"{', '.join(repr(cell.strip()) for cell in cells) or 'nothing'}\nexpected:\n{LAYOUT}"
        )
    return first + 1, delimiter, columns, len(cells)


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:  # a cell longer than any list has, as in a file that is none
        return []


def _columns(cells: list[str]) -> dict[str, int]:
    plain = [_plain(cell) for cell in cells]
    found = {}
    for column, names in COLUMNS.items():
        if name := next((name for name in names if name in plain), None):
            found[column] = plain.index(name)
    return found


def _plain(text: str) -> str:
    return re.sub("[^a-z0-9]", "", text.casefold())


def _records(lines: list[str], start: int, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the line and the cells of every record, or what is wrong with it; reading goes on with the next line."""
    while start < len(lines):
        reader = csv.reader(lines[start:], delimiter=delimiter, strict=True, skipinitialspace=True)
        done = 0
        try:
            for cells in reader:
                yield start + done + 1, cells
                done = reader.line_num
            return
        except csv.Error as error:
            closed = "a quote is not closed, or text follows a closed one"
            yield (
                start + done + 1,
                closed if "expected after" in str(error) or "end of data" in str(error) else str(error),
            )
            start += done + 1


def _row(file: Path, cells: list[str], columns: dict[str, int], width: int) -> tuple[Row | None, str]:
    """Make a row of cells, or say what is wrong with them."""
    given = {column: cells[at].strip() if at < len(cells) else "" for column, at in columns.items()}
    if any(cell.strip() for cell in cells[width:]):
        return None, f"it has {len(cells)} cells, the header {width}; put text that holds the delimiter in quotes"
    empty = [column for column in ("path", "person", "split") if not given.get(column, "-")]
    if empty:
        return None, f"{' and '.join(empty)} must not be empty, got {cells!r}"
    part = PART.get(_plain(given["split"])) if "split" in given else ""
    if part is None:
        return None, f"split must be train, query or gallery, got {given['split']!r} for {given['path']!r}"
    return Row(_path(file, given["path"]), given["person"], given.get("camera") or None, part), ""


def _path(file: Path, text: str) -> str:
    """Return an absolute path; Windows' backslashes are read as slashes where no file has them in its name."""
    path = os.path.join(file.parent, os.path.expanduser(text))
    if "\\" in text and not os.path.exists(path):
        path = os.path.join(file.parent, text.replace("\\", "/"))
    return path
