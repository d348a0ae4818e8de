"""MSMT17, V1 and V2: list files name the images; training takes list_train and list_val, as the ReID papers do."""

import os
import re
from pathlib import Path

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets.market1501 import PARTS, compare, find_folder, layout_error, read_layout
from fusionreid.dataloading.records import DataError, Record, Split, printable

VERSIONS = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}
FILE_NAME = re.compile(r"\d+_\d+_(\d+)_")  # person, number, camera
PUBLISHED = (32_621, 11_659, 82_161)
LAYOUT = """\
  train/, test/ (V1) or mask_train_v2/, mask_test_v2/ (V2), in them 0000/0000_000_01_0303morning_0008_0.jpg
  list_train.txt, list_val.txt, list_query.txt, list_gallery.txt, in them lines of <path> <person>
or the Market-1501 layout: bounding_box_train/, query/, bounding_box_test/, in them 0000_c1_0000.jpg"""


def read(cfg: DatasetsConfig) -> Split:
    folder = find_folder(cfg.ROOT_DIR, "msmt17", ["list_train.txt", PARTS["train"]], LAYOUT)
    if (folder / PARTS["train"]).exists():
        split = read_layout(folder, "msmt17", "MSMT17 in the Market-1501 layout, V1 or V2 unknown")
    else:
        version = _version(folder)
        train, test = VERSIONS[version]
        split = Split(
            "msmt17",
            str(folder),
            train=_read_lists(folder, ("list_train.txt", "list_val.txt"), train),
            query=_read_lists(folder, ("list_query.txt",), test),
            gallery=_read_lists(folder, ("list_gallery.txt",), test),
            note=f"MSMT17 {version}, train + val",
        )
    return compare(split, PUBLISHED)


def _version(folder: Path) -> str:
    found = [name for name, subfolders in VERSIONS.items() if all((folder / sub).is_dir() for sub in subfolders)]
    if len(found) != 1:
        problem = "V1 and V2 side by side; keep one" if found else "neither the folders of V1 nor those of V2"
        raise layout_error(f"msmt17: {problem} in {printable(folder)}", LAYOUT, folder)
    return found[0]


def _read_lists(folder: Path, names: tuple[str, ...], subfolder: str) -> tuple[Record, ...]:
    records: list[Record] = []
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
            records.append(Record(os.path.splitext(full)[0] + suffix if suffix else full, person, camera))
    return tuple(sorted(records, key=lambda record: record.path))


def _parse(line: str, where: str) -> tuple[str, int, int]:
    path, _, person = line.strip().rpartition(" ")
    match = FILE_NAME.match(os.path.basename(path))
    if match is None or not person.isdecimal() or int(match[1]) < 1:
        raise DataError(f"msmt17: {where} must be like '0000/0000_000_01_0303morning_0008_0.jpg 0', got {line!r}")
    return path.strip(), int(person), int(match[1]) - 1


def _suffix(first: Path) -> str:
    """The suffix the files have on disk, where the list says .jpg for .jpeg or the reverse; else nothing."""
    other = {".jpg": ".jpeg", ".jpeg": ".jpg"}.get(first.suffix, first.suffix)
    return other if not first.exists() and first.with_suffix(other).exists() else ""
