"""MSMT17, V1 and V2: list files name the images; training takes list_train and list_val, as the ReID papers do."""

import os
import re
from pathlib import Path

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets.assemble import Published, Row, assemble
from fusionreid.dataloading.datasets.market1501 import MARKS, compare, find_folder, layout_error, read_layout
from fusionreid.dataloading.image_files import find_files
from fusionreid.dataloading.records import DataError, Split, printable

VERSIONS = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}
FILE_NAME = re.compile(r"\d+_\d+_(\d+)_")  # person, number, camera
COUNTS = (32_621, 11_659, 82_161)
PUBLISHED = Published(cameras=15, persons_recur=False)  # train and test number their persons apart
LAYOUT = """\
  train/, test/ (V1) or mask_train_v2/, mask_test_v2/ (V2), in them 0000/0000_000_01_0303morning_0008_0.jpg
  list_train.txt, list_val.txt, list_query.txt, list_gallery.txt, in them lines of <path> <person>
or the Market-1501 layout: bounding_box_train/, query/, bounding_box_test/, in them 0000_c1_0000.jpg"""


def read(cfg: DatasetsConfig) -> Split:
    """Read MSMT17, found by its usual folder names in or below DATASETS.ROOT_DIR."""
    folder = find_folder(cfg.ROOT_DIR, "msmt17", ["list_train.txt", *MARKS], LAYOUT)
    if any((folder / mark).exists() for mark in MARKS):
        note = "MSMT17 in the Market-1501 layout, V1 or V2 unknown"
        return compare(read_layout(folder, "msmt17", note, PUBLISHED), COUNTS)
    version = _version(folder)
    train, test = VERSIONS[version]
    rows = [
        *_read_lists(folder, ("list_train.txt", "list_val.txt"), train, "train"),
        *_read_lists(folder, ("list_query.txt",), test, "query"),
        *_read_lists(folder, ("list_gallery.txt",), test, "gallery"),
    ]
    paths, left_out = find_files(folder)
    if unlisted := sorted({*paths} - {row.path for row in rows}):
        left_out["in none of the list files"] = unlisted
    note = f"MSMT17 {version}, train + val"
    return compare(assemble("msmt17", str(folder), rows, left_out, note=note, published=PUBLISHED), COUNTS)


def _version(folder: Path) -> str:
    found = [name for name, subfolders in VERSIONS.items() if all((folder / sub).is_dir() for sub in subfolders)]
    if len(found) != 1:
        problem = "V1 and V2 side by side; keep one" if found else "neither the folders of V1 nor those of V2"
        raise layout_error(f"msmt17: {problem} in {printable(folder)}", LAYOUT, folder)
    return found[0]


def _read_lists(folder: Path, names: tuple[str, ...], subfolder: str, part: str) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        if not (folder / name).is_file():
            raise layout_error(f"msmt17: no file {name} in {printable(folder)}", LAYOUT, folder)
        lines = (folder / name).read_text(encoding="utf-8-sig").splitlines()
        listed = [_parse(line, f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        if not listed:
            raise layout_error(f"msmt17: {name} in {printable(folder)} lists no images", LAYOUT, folder)
        suffix = _suffix(folder / subfolder / listed[0][0])
        for path, person, camera in listed:
            full = os.path.join(folder, subfolder, path)
            rows.append(Row(os.path.splitext(full)[0] + suffix if suffix else full, person, camera, part))
    return rows


def _parse(line: str, where: str) -> tuple[str, str, str]:
    """Take path, person and camera from a line."""
    path, _, person = line.strip().rpartition(" ")
    match = FILE_NAME.match(os.path.basename(path))
    if match is None or not person.isdecimal() or int(match[1]) < 1:
        raise DataError(f"msmt17: {where} must be like '0000/0000_000_01_0303morning_0008_0.jpg 0', got {line!r}")
    return path.strip(), person.zfill(4), str(int(match[1]))


def _suffix(first: Path) -> str:
    """Return the suffix on disk if the list says .jpg for .jpeg or the reverse; else an empty text."""
    other = {".jpg": ".jpeg", ".jpeg": ".jpg"}.get(first.suffix, first.suffix)
    return other if not first.exists() and first.with_suffix(other).exists() else ""
