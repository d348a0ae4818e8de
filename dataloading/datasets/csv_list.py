"""Own data in a list: a CSV file that names path, person, camera and split of every image."""

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets.assemble import Row, assemble
from fusionreid.dataloading.image_files import SIGNATURES
from fusionreid.dataloading.records import DataError, Split, printable

COLUMNS = {  # what a column may be called, the first name being the usual one; only letters and digits count
    "path": ("path", "file", "filename", "filepath", "image", "imagepath", "imagename", "img", "imgpath", "crop"),
    "person": ("person", "personid", "pid", "identity", "subject", "label", "id", "name"),
    "camera": ("camera", "cameraid", "cam", "camid", "cameraname"),
    "split": ("split", "part", "set", "subset", "partition", "phase", "usage"),
}
VALUES = {
    "train": ("train", "training", "boundingboxtrain"),
    "query": ("query", "queries", "probe"),
    "gallery": ("gallery", "boundingboxtest"),
}
TEST = ("test", "testing", "val", "valid", "validation", "eval")  # to be divided into query and gallery
PART = {value: part for part, values in (VALUES | {"test": TEST}).items() for value in values}
DELIMITERS = ",;\t|"
FAULTS = 20  # told in one run
SHOWN = 10  # cells of a header in a message, and
WIDTH = 40  # characters of each
FOREIGN = {  # first bytes of what is taken for a list
    b"PK\x03\x04": "a ZIP archive or a spreadsheet: unpack it, or save the sheet as CSV",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"%PDF": "a PDF file: name a folder of images, or a CSV file",
    b"\xd0\xcf\x11\xe0": "a spreadsheet: save it as CSV",
    b"\x89HDF": "an HDF5 file: make a CSV file of it",
    b"\x80": "a pickle: make a CSV file of it",
    b"{": "JSON: make a CSV file of it",
    b"[": "JSON: make a CSV file of it",
    b"<": "a web page or XML: make a CSV file of it",
}
LAYOUT = """\
  DATASETS.ROOT_DIR names a CSV file, paths are relative to its folder:
  path,person,camera,split
  crops/0001.jpg,anna,entrance,train       split: train, query or gallery; the column camera may be missing"""


def part_of(name: str) -> str | None:
    """Return the part that a name means: train, query, gallery, or test, which is not divided yet."""
    return PART.get(_plain(name))


def read(cfg: DatasetsConfig) -> Split:
    """Read the list DATASETS.ROOT_DIR."""
    file = Path(cfg.ROOT_DIR).expanduser().absolute()
    rows, columns, faults = read_rows(file, ("path", "person", "split"), {*VALUES})
    if faults:
        raise DataError("\n".join(faults))
    return assemble("csv", str(file), rows, {}, note=columns)


def read_rows(file: Path, needed: Sequence[str], parts: set[str]) -> tuple[list[Row], str, list[str]]:
    """Read the rows of a list that has at least the columns `needed`.

    Also says what its columns were taken for, and what is wrong with the rows that cannot be used, the first FAULTS of
    them line by line. Without a split the part of every row is empty; a split names one of `parts`.
    """
    if not file.is_file():
        raise DataError(f"csv: no file {printable(file)}\nexpected:\n{LAYOUT}")
    lines = list(io.StringIO(_text(file), newline=""))
    start, delimiter, columns, cells = _header(file, lines, needed)
    rows, faults, broken = [], [], 0
    for number, record in _records(lines, start, delimiter):
        if isinstance(record, str):
            faults.append(f"  line {number}: {record}")
            broken += 1
            if broken > FAULTS:  # each may have read to the end of the file
                break
        elif any(cell.strip() for cell in record):
            row, fault = _row(file, record, columns, len(cells), parts)
            rows += [row] if row else []
            faults += [f"  line {number}: {fault}"] if fault else []
    if faults:
        more = [f"  and {len(faults) - FAULTS:,} more"] if len(faults) > FAULTS else []
        more += ["  the rest was not read"] if broken > FAULTS else []
        faults = [f"csv: {printable(file)} has {len(faults):,} rows that cannot be used:", *faults[:FAULTS], *more]
    return rows, _described(columns, cells), faults


def _text(file: Path) -> str:
    """Decode UTF-8 or UTF-16, with or without its mark; other bytes stay what they are, for the names of files."""
    data = file.read_bytes()
    for start, what in FOREIGN.items():
        if data.startswith(start):
            raise DataError(f"{printable(file)} is not a list but {what}\nexpected:\n{LAYOUT}")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    if 4 * (start := data[:1000]).count(0) > len(start):
        little = start[1::2].count(0) >= start[::2].count(0)
        return data.decode("utf-16-le" if little else "utf-16-be", "replace")
    if b"\0" in start:
        kind = "an image: name the folder that it lies in" if start.startswith(SIGNATURES) else "a binary file"
        raise DataError(f"{printable(file)} is not a list but {kind}\nexpected:\n{LAYOUT}")
    return data.decode("utf-8-sig", "surrogateescape")


def _described(columns: Mapping[str, int], cells: Sequence[str]) -> str:
    """Say what the columns were taken for, unless they bear the very names of COLUMNS."""
    names = {column: cells[at].strip() for column, at in columns.items()}
    renamed = [f"{column} from {name!r}" for column, name in names.items() if _plain(name) != column]
    unread = [repr(cell.strip()) for at, cell in enumerate(cells) if at not in columns.values() and cell.strip()]
    return "; ".join([*renamed, *([f"not read: {', '.join(unread)}"] if unread else [])])


def _header(file: Path, lines: list[str], needed: Sequence[str]) -> tuple[int, str, dict[str, int], list[str]]:
    """Return the line after the header, the delimiter, the position of every known column, and the header's cells."""
    first = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    delimiters = DELIMITERS
    if match := re.fullmatch(r"sep=(.)\s*", lines[first] if first < len(lines) else "", re.IGNORECASE):
        first, delimiters = first + 1, match[1]
    line = lines[first] if first < len(lines) else ""
    readings = [(delimiter, _cells(line, delimiter)) for delimiter in delimiters]
    delimiter, cells = max(readings, key=lambda reading: len(_columns(reading[1])))
    columns = _columns(cells)
    if missing := [column for column in needed if column not in columns]:
        more = ", ..." if len(cells) > SHOWN else ""
        listed = ", ".join(repr(printable(cell.strip()[:WIDTH])) for cell in cells[:SHOWN]) + more
        raise DataError(
            f"csv: {printable(file)} lacks {', '.join(missing)} in its header, which has "
            f"{listed or 'nothing'}\nexpected:\n{LAYOUT}"
        )
    plain = [_plain(cell) for cell in cells]
    if twice := [cells[at].strip() for at in columns.values() if plain.count(plain[at]) > 1]:
        raise DataError(f"csv: {printable(file)} has the column {twice[0]!r} twice: remove one of them")
    return first + 1, delimiter, columns, cells


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


def _row(
    file: Path, cells: list[str], columns: Mapping[str, int], width: int, parts: set[str]
) -> tuple[Row | None, str]:
    """Make a row of cells, or say what is wrong with them."""
    given = {column: cells[at].strip() if at < len(cells) else "" for column, at in columns.items()}
    if any(cell.strip() for cell in cells[width:]):
        return None, f"it has {len(cells)} cells, the header {width}; put text that holds the delimiter in quotes"
    empty = [column for column in ("path", "person", "split") if not given.get(column, "-")]
    if empty:
        return None, f"{' and '.join(empty)} must not be empty, got {cells!r}"
    part = part_of(given["split"]) if "split" in given else ""
    if part is None or (part and part not in parts):
        rule = f"split must be {', '.join(sorted(parts - {'gallery'}, reverse=True))} or gallery"
        hint = "; train --data divides a test by itself" if part == "test" else ""
        return None, f"{rule}, got {given['split']!r} for {given['path']!r}{hint}"
    camera = _name(given.get("camera", "")) or None
    return Row(_path(file, given["path"]), _name(given["person"]), camera, part), ""


def _name(text: str) -> str:
    """Return a name; bytes that are not UTF-8 are read as Windows' spreadsheets write them."""
    return text if text.isascii() or text.isprintable() else _western(text)


def _western(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def _path(file: Path, text: str) -> str:
    """Return an absolute path: the first reading of a text that a file answers to, or else its plain reading.

    Windows' backslashes are read as slashes, and bytes that are not UTF-8 as its spreadsheets write them, only where
    no file has them in its name.
    """
    text = unquote(text.removeprefix("file://")) if text.startswith("file:///") else text
    plain = os.path.join(file.parent, os.path.expanduser(text))
    if ".." not in text:
        plain = os.path.normpath(plain)  # one file, one name; beyond a link .. may lead elsewhere
    readings = [text.replace("\\", "/")] if "\\" in text else []
    readings += [_western(reading) for reading in [text, *readings]] if not text.isprintable() else []
    if not readings or os.path.exists(plain):
        return plain
    paths = [os.path.normpath(os.path.join(file.parent, reading)) for reading in readings]
    return next(filter(os.path.exists, paths), paths[0])
