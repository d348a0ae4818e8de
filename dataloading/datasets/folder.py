"""Own data: a folder per person, or a CSV file that names path, person, camera and split of every image."""

import csv
import os
import re
from collections.abc import Iterable
from pathlib import Path

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets.market1501 import layout_error
from fusionreid.dataloading.records import PARTS, DataError, Record, Split, list_images, printable

COLUMNS = ("path", "person", "camera", "split")
CAMERA = re.compile(r"(?:^|[^a-z0-9])c(?:am|amera)?(\d+)(?=s\d|[^a-z0-9]|$)", re.IGNORECASE)
LAYOUT = """\
  train/<person>/<image>, query/<person>/<image>, gallery/<person>/<image>
  the camera is c<number> in the image's name (c3_0001.jpg, 17_c3s1_02.jpg, cam3-1.png, camera3.jpg),
  or a folder: train/<person>/<camera>/<image>
persons in no such folders yet, or cameras with names: README.md, "Your own cameras", makes a list for NAMES csv"""
CSV_LAYOUT = """\
  DATASETS.ROOT_DIR names a CSV file, paths are relative to its folder:
  path,person,camera,split
  crops/0001.jpg,anna,entrance,train       split: train, query or gallery"""

Row = tuple[str, str, str | None, str]  # path, person, camera, split


def read(cfg: DatasetsConfig) -> Split:
    root = Path(cfg.ROOT_DIR).expanduser().absolute()
    rows: list[Row] = []
    skipped = 0
    for part in PARTS:
        if not (root / part).is_dir():
            raise layout_error(
                f"folder: no folder {part} in {printable(root)}", LAYOUT, root if root.is_dir() else None
            )
        for person in _subfolders(root / part):
            for folder in (person, *_subfolders(person)):
                images, not_files = list_images(folder)
                skipped += not_files
                rows += [(path, person.name, _camera(path, folder, person), part) for path in images]
        if not any(row[3] == part for row in rows):
            raise layout_error(f"folder: no images in {printable(root / part)}", LAYOUT, root / part)
    notes = [f"{skipped} entries left out, no regular files"] if skipped else []
    nameless = [path for path, _, camera, _ in rows if camera is None]
    if nameless and len(nameless) < len(rows):
        raise DataError(
            f"folder: {len(nameless):,} of {len(rows):,} images name no camera, the first is {printable(nameless[0])}; "
            f"name it for all or for none\nexpected:\n{LAYOUT}"
        )
    if nameless:
        notes.append(
            "no cameras named: train and query count as camera 0, gallery as camera 1, so that no match is left out"
        )
        rows = [(path, person, "1" if part == "gallery" else "0", part) for path, person, _, part in rows]
    return _split("folder", str(root), rows, "; ".join(notes))


def _subfolders(folder: Path) -> list[Path]:
    """Real ones: a link could lead back."""
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))


def _camera(path: str, folder: Path, person: Path) -> str | None:
    if folder != person:
        return folder.name
    match = CAMERA.search(os.path.splitext(os.path.basename(path))[0])
    return str(int(match[1])) if match else None


def read_csv(cfg: DatasetsConfig) -> Split:
    file = Path(cfg.ROOT_DIR).expanduser().absolute()
    if not file.is_file():
        raise DataError(f"csv: no file {printable(file)}\nexpected:\n{CSV_LAYOUT}")
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        reader = csv.DictReader(lines, skipinitialspace=True)
        header = [name.strip() for name in reader.fieldnames or ()]
        missing = [column for column in COLUMNS if column not in header]
        if missing:
            raise DataError(f"csv: {printable(file)} lacks {', '.join(missing)} in its header\nexpected:\n{CSV_LAYOUT}")
        reader.fieldnames = header
        rows = [_row(row, file, reader.line_num) for row in reader]
    return _split("csv", str(file), rows, "")


def _row(row: dict[str, str | None], file: Path, line: int) -> Row:
    path, person, camera, part = ((row[column] or "").strip() for column in COLUMNS)
    if not (path and person and camera) or part not in PARTS:
        raise DataError(
            f"csv: {printable(file)}:{line} must have path, person, camera and a split of train, query or gallery, got "
            f"{path!r}, {person!r}, {camera!r}, {part!r}"
        )
    return os.path.join(file.parent, path), person, camera, part


def _split(name: str, root: str, rows: list[Row], note: str) -> Split:
    """Persons are numbered from 1 (0 would be a distractor) over all parts, cameras from 0, each in sorted order."""
    persons = _numbered((row[1] for row in rows), 1)
    cameras = _numbered((row[2] or "" for row in rows), 0)
    parts: dict[str, list[Record]] = {part: [] for part in PARTS}
    for path, person, camera, part in sorted(rows, key=lambda row: row[0]):
        parts[part].append(Record(path, persons[person], cameras[camera or ""]))
    return Split(name, root, tuple(parts["train"]), tuple(parts["query"]), tuple(parts["gallery"]), note)


def _numbered(names: Iterable[str], start: int) -> dict[str, int]:
    """Numbers in the order of their value, before all other names."""
    ordered = sorted(set(names), key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
    return {name: number for number, name in enumerate(ordered, start)}
