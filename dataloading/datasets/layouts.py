"""Folders of own data in any layout to rows: which folders divide the data, which name persons, which cameras."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fusionreid.dataloading.datasets import csv_list, folder, market1501
from fusionreid.dataloading.datasets.assemble import Row
from fusionreid.dataloading.datasets.divide import TEST
from fusionreid.dataloading.datasets.levels import CAMERA_WORD, find_levels_of_one
from fusionreid.dataloading.records import LeftOut

NAMED = 0.9  # share of images whose name must tell person and camera
NAME_OF_CAMERA = re.compile(  # <camera>_<date and time>, or <camera>_<number>
    r"(?P<stamped>.+?)[ _-]+(?:19|20)\d\d[-_.]?\d\d[-_.]?\d\d(?:[ _.T-]*\d+)*|(?P<numbered>.+?)[ _-]+\d+"
)
LOOSE = "in no person's folder, and its name does not begin with <person>_c<camera>"
LINKED = "in a folder that is a link to another one here"
NAMES = "person and camera from names of files: <person>_c<camera>"


class Found(NamedTuple):
    """The rows of a folder or a list, and what was noticed on the way."""

    rows: list[Row]
    left_out: LeftOut
    decisions: list[str]
    warnings: list[str]
    faults: Sequence[str] = ()  # rows of a list that cannot be used


def read_folders(base: Path, files: Sequence[str], left_out: LeftOut) -> Found:
    """Make rows of the images in `base`, with the parts of folders such as train and test, or without parts."""
    parts = _part_folders(base, files)
    return _of_parts(base, files, left_out, parts) if parts else _of_one(base, files, left_out)


def unwrapped(root: Path, files: Sequence[str]) -> Path:
    """Go down while nearly all images lie in the folders of one folder."""
    while True:
        places = [file.removeprefix(f"{root}{os.sep}").split(os.sep) for file in files]
        inside = [place for place in places if len(place) > 2]
        above = {place[0] for place in inside}
        if len(above) != 1 or len(inside) < NAMED * len(files) or all(CAMERA_WORD.fullmatch(p[1]) for p in inside):
            return root
        root = root / above.pop()


def _part_folders(base: Path, files: Iterable[str]) -> dict[str, str]:
    """Return the part of every folder in `base` that is one, if together they divide the data; else nothing."""
    names = {file.removeprefix(f"{base}{os.sep}").split(os.sep)[0] for file in files}
    parts = {name: part for name in sorted(names) if (part := csv_list.part_of(name)) and (base / name).is_dir()}
    found = {*parts.values()}
    if "query" in found and "gallery" not in found:
        parts = {name: "gallery" if part == TEST else part for name, part in parts.items()}
        found = {*parts.values()}
    tests = [name for name, part in parts.items() if part == TEST]
    if "query" not in found and len(tests) > 1:  # validation is for training where there is a test
        parts |= {name: "train" for name in tests if not name.lower().startswith("test")}
    divided = {"query", "gallery"} <= found or ("train" in found and TEST in found)
    return parts if divided else {}


def _of_parts(base: Path, files: Sequence[str], left_out: LeftOut, parts: dict[str, str]) -> Found:
    named = ", ".join(name if name == part else f"{name} as {part}" for name, part in parts.items())
    inside = [(path, *path.removeprefix(f"{base}{os.sep}").split(os.sep)) for path in files]
    inside = [place for place in inside if place[1] in parts]
    if named_well := _named_well([path for path, _, *below in inside if len(below) == 1], len(inside)):
        by_part = {path: parts[part] for path, part, *_ in inside}
        _leave_out(f"outside the folders {', '.join(parts)}", [path for path in files if path not in by_part], left_out)
        _leave_out(LOOSE, [path for path in by_part if path not in named_well], left_out)
        rows = [row._replace(part=by_part[row.path]) for row in named_well.values()]
        return Found(rows, left_out, [f"the folders {named}; {NAMES}"], [])
    rows, levels = folder.rows_of(base, files, parts, left_out)
    decisions = [f"the folders {named}" + (f"; {levels.why}" if levels.why else "")]
    return Found(rows, left_out, decisions, [levels.doubt] if levels.doubt else [])


def _named_well(paths: Iterable[str], count: int) -> dict[str, Row]:
    """Make rows of the images whose names tell person and camera, if they are nearly all of `count`."""
    names = {path: market1501.OWN_NAME.match(os.path.basename(path)) for path in paths}
    rows = {path: Row(path, match[1], str(int(match[2])), "") for path, match in names.items() if match}
    return rows if len(rows) >= NAMED * count else {}


def _of_one(root: Path, files: Sequence[str], left_out: LeftOut) -> Found:
    """Take person and camera of every image from names of folders or files; from both, where they say the same."""
    once, linked = _without_links(root, files)
    _leave_out(LINKED, linked, left_out)
    folders = {path: tuple(path.removeprefix(f"{root}{os.sep}").split(os.sep)[:-1]) for path in once}
    levels = find_levels_of_one([*folders.values()])
    inside = [path for path in once if len(folders[path]) > levels.person]
    agreed = ""
    if named_well := _named_well(once, len(once)):
        named = [path for path in inside if path in named_well]
        if not _say_the_same((folders[path][levels.person], named_well[path].person) for path in named):
            _leave_out(LOOSE, [path for path in once if path not in named_well], left_out)
            return Found([*named_well.values()], left_out, [NAMES], [])
        both = ((folder.camera_of(path, folders[path], levels), named_well[path].camera) for path in named)
        if not _say_the_same(both):
            levels = levels._replace(camera=None, doubt="")
        agreed = "; the names of files say the same persons"
    _leave_out(LOOSE, [path for path in once if len(folders[path]) <= levels.person], left_out)
    cameras = [folder.camera_of(path, folders[path], levels) for path in inside]
    if levels.camera is None and not any(cameras):
        cameras = _prefixes(inside)
    rows = [Row(p, folders[p][levels.person], camera, "") for p, camera in zip(inside, cameras)]
    where = "nowhere" if not any(cameras) else "folders" if levels.camera is not None else "names of files"
    decision = f"persons from folders, cameras from {where}{agreed}" + (f"; {levels.why}" if levels.why else "")
    return Found(rows, left_out, [decision], [levels.doubt] if levels.doubt else [])


def _without_links(root: Path, files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide files into those to use, and those that lie in a link to a folder whose own files are there too."""
    folders = {os.path.dirname(path) for path in files}
    real = {folder: os.path.realpath(folder) for folder in folders}
    own = {folder for folder in folders if real[folder] == os.path.realpath(root) + folder.removeprefix(str(root))}
    linked = {folder for folder in folders - own if real[folder] in {real[other] for other in own}}
    once = [path for path in files if os.path.dirname(path) not in linked]
    return once, [path for path in files if os.path.dirname(path) in linked]


def _say_the_same(pairs: Iterable[tuple[str | None, str | None]]) -> bool:
    """Tell whether folders and names of files divide nearly all images alike, by the two names of each."""
    counts = Counter(pairs)
    rising = [pair for pair, _ in reversed(counts.most_common())]
    alike = {*{pair[0]: pair for pair in rising}.values()} & {*{pair[1]: pair for pair in rising}.values()}
    return len(alike) > 1 and sum(counts[pair] for pair in alike) >= NAMED * counts.total()


def _leave_out(reason: str, paths: Sequence[str], left_out: LeftOut) -> None:
    if paths:
        left_out[reason] = sorted({*left_out.get(reason, ()), *paths})


def _prefixes(paths: Iterable[str]) -> list[str | None]:
    """Take cameras from names such as hall_0001.jpg, if several persons share them."""
    matches = [NAME_OF_CAMERA.fullmatch(os.path.splitext(os.path.basename(path))[0]) for path in paths]
    found = [match and (match["stamped"] or match["numbered"]) for match in matches]
    persons = defaultdict(set)
    for path, camera in zip(paths, found):
        persons[camera].add(os.path.dirname(path))
    shared = None not in persons and len(persons) > 1 and all(len(folders) > 1 for folders in persons.values())
    return [camera if shared else None for camera in found]
