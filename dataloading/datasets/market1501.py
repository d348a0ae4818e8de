"""Market-1501, and any data set in its layout: three folders, person and camera in the file name."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.records import DataError, Record, Split, list_images, printable

PARTS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
FILE_NAME = re.compile(r"(-?\d+)_c(\d+)")
JUNK = -1  # person id of boxes that show nobody
PUBLISHED = (12_936, 3_368, 15_913)  # without junk
LAYOUT = """\
  bounding_box_train/0002_c1s1_000451_03.jpg    person 2, camera 1
  query/0001_c1s1_001051_00.jpg
  bounding_box_test/0000_c1s1_000151_01.jpg     person 0: distractor; person -1: junk, left out"""


def read(cfg: DatasetsConfig) -> Split:
    folder = find_folder(cfg.ROOT_DIR, "market1501", [PARTS["train"]], LAYOUT)
    return compare(read_layout(folder, "market1501"), PUBLISHED)


def read_own(cfg: DatasetsConfig) -> Split:
    """Own data with Market-style names, right in ROOT_DIR."""
    return read_layout(find_folder(cfg.ROOT_DIR, None, [PARTS["train"]], LAYOUT), "market")


def read_layout(folder: Path, name: str, note: str = "") -> Split:
    """The three folders of the Market-1501 layout in `folder`."""
    folder = folder.absolute()
    parts: dict[str, tuple[Record, ...]] = {}
    notes = [note] if note else []
    for part, subfolder in PARTS.items():
        if not (folder / subfolder).is_dir():
            raise layout_error(f"{name}: no folder {subfolder} in {printable(folder)}", LAYOUT, folder)
        paths, skipped = list_images(folder / subfolder)
        parts[part] = tuple(record for path in paths if (record := _record(path)).person != JUNK)
        if skipped:
            notes.append(f"{subfolder}: {skipped} entries left out, no regular files")
        if not parts[part]:
            raise layout_error(f"{name}: no images in {printable(folder / subfolder)}", LAYOUT, folder / subfolder)
    return Split(name, str(folder), **parts, note="; ".join(notes))


def _record(path: str) -> Record:
    match = FILE_NAME.match(os.path.basename(path))
    if match is None or int(match[2]) < 1:
        raise DataError(
            f"the name of an image must begin with <person>_c<camera>, cameras counted from 1, got {printable(path)}"
        )
    return Record(path, int(match[1]), int(match[2]) - 1)


def find_folder(root_dir: str, prefix: str | None, marks: Sequence[str], layout: str) -> Path:
    """The folder that holds one of `marks`: `root_dir`, or one up to two levels below whose name begins with `prefix`.

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


def layout_error(problem: str, layout: str, looked_in: Path | None) -> DataError:
    """The problem, the layout expected, and what is there instead."""
    lines = [problem, "expected:", layout]
    if looked_in is not None:
        names = sorted(entry.name for entry in os.scandir(looked_in))
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        lines.append(f"found in {printable(looked_in)}: {', '.join(map(printable, names[:10])) or 'nothing'}{more}")
    return DataError("\n".join(lines))


def compare(split: Split, published: tuple[int, int, int]) -> Split:
    """A warning in the note where the counts of images are not the published ones."""
    counts = len(split.train), len(split.query), len(split.gallery)
    if counts == published:
        return split
    pairs = (f"{part} {count:,} ({known:,})" for part, count, known in zip(PARTS, counts, published))
    warning = f"warning: not the published set; images here (published): {', '.join(pairs)}"
    return replace(split, note="; ".join(filter(None, [split.note, warning])))
