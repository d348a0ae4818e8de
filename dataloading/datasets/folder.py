"""Own data in folders: a folder per person below train, query and gallery, cameras in folders or file names."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets.assemble import Row, assemble
from fusionreid.dataloading.datasets.levels import Levels, find_levels
from fusionreid.dataloading.datasets.market1501 import layout_error
from fusionreid.dataloading.image_files import find_files
from fusionreid.dataloading.records import PARTS, LeftOut, Split, printable

CAMERA = re.compile(  # c3, cam3, camera3, c3s1, or 0001C3T0001F001 as MARS has it
    r"(?:^|[^a-z0-9])c(?:am|amera)?(\d+)(?=s\d|[^a-z0-9]|$)|(?<=\d)c(\d+)(?=t\d+f\d)", re.IGNORECASE
)
LAYOUT = """\
  train/<person>/<image>, query/<person>/<image>, gallery/<person>/<image>; train only for training
  the camera is c<number> in the image's name (c3_0001.jpg, 17_c3s1_02.jpg, cam3-1.png, camera3.jpg),
  or a folder: train/<person>/<camera>/<image>, or train/<camera>/<person>/<image>
persons in no such folders yet: make a list for DATASETS.NAMES csv"""
LOOSE = "in no person's folder"


def read(cfg: DatasetsConfig) -> Split:
    """Read the folders train, query and gallery of DATASETS.ROOT_DIR."""
    root = Path(cfg.ROOT_DIR).expanduser().absolute()
    for part in ("query", "gallery"):
        if not (root / part).is_dir():
            raise layout_error(f"folder: no folder {part} in {printable(root)}", LAYOUT, root)
    paths, left_out = find_files(root)
    rows, levels = rows_of(root, paths, dict(zip(PARTS, PARTS)), left_out)
    for part in ("query", "gallery"):
        if not any(row.part == part for row in rows):
            problem = f"folder: no images in a person's folder in {printable(root / part)}"
            raise layout_error(problem, LAYOUT, root / part, left_out)
    warnings = [levels.doubt] if levels.doubt else []
    return assemble("folder", str(root), rows, left_out, note=levels.why, warnings=warnings)


def rows_of(root: Path, paths: Sequence[str], parts: Mapping[str, str], left_out: LeftOut) -> tuple[list[Row], Levels]:
    """Make rows of the images in folders of `parts`, folder -> part; add the others to `left_out`."""
    prefix = f"{root}{os.sep}"
    places = [(path, *path.removeprefix(prefix).split(os.sep)[:-1]) for path in paths]
    folders: dict[str, list[tuple[str, ...]]] = {part: [] for part in PARTS}
    for _, *place in places:
        if place and place[0] in parts:
            part = parts[place[0]]
            folders[part if part in PARTS else "gallery"].append(tuple(place[1:]))
    levels = find_levels(folders)
    rows = []
    for path, *place in places:
        where, *below = place or [""]
        if where not in parts:
            left_out.setdefault(f"outside the folders {', '.join(parts)}", []).append(path)
        elif len(below) <= levels.person:
            left_out.setdefault(LOOSE, []).append(path)
        else:
            rows.append(Row(path, below[levels.person], camera_of(path, below, levels), parts[where]))
    return rows, levels


def camera_of(path: str, folders: Sequence[str], levels: Levels) -> str | None:
    """Return the camera of an image by the folders above it, or by its name; None: neither tells."""
    if levels.camera is not None and levels.camera < len(folders):
        return folders[levels.camera]
    match = CAMERA.search(os.path.splitext(os.path.basename(path))[0])
    return str(int(match[1] or match[2])) if match else None
