"""Levels of folders: which one names the person and which one the camera, told apart by the data."""

import re
from collections.abc import Collection, Mapping
from math import nan
from typing import NamedTuple

CAMERA_WORD = re.compile(r"(?:c|cam|camera)[ _.-]*\d+", re.IGNORECASE)
DATE = re.compile(
    r"(?:19|20)\d\d[-_. ]?\d\d[-_. ]?\d\d.*|\d{1,2}[-_. ]\d{1,2}[-_. ](?:19|20)?\d\d|[ap]m|\d{1,2}h?[-_:]\d\d"
)
RECURS = 1.5  # folders above a name, on average, where it names a camera
LEVELS = 3  # that are looked at; folders further down only group images
RECURRING, DISTINCT = 0.5, 0.1  # share of a level's names that are both in train and in test

Places = Mapping[str, Collection[tuple[str, ...]]]  # part -> folders between the part and each image


class Levels(NamedTuple):
    """Positions of person and camera in the folders of an image; no `camera`: the images are right in the person's."""

    person: int
    camera: int | None
    why: str = ""  # where the order is not the usual person/camera
    doubt: str = ""


def find_levels(places: Places) -> Levels:
    """Tell the person's level from the camera's.

    Words such as `cam1` name cameras. Else cameras recur in train and test, while persons do not; without such evidence
    the person is above the camera.
    """
    deep = {part: [folders for folders in found if len(folders) > 1] for part, found in places.items()}
    depth = min(LEVELS, max((len(folders) for found in deep.values() for folders in found), default=1))
    if depth == 1:
        names = {folders[0] for found in places.values() for folders in found if folders}
        doubt = "folders named like cameras are read as persons" if names and _words(names) else ""
        return Levels(0, None, doubt=doubt)
    named = [_names(deep, level) for level in range(depth)]
    choices = [level for level in range(depth) if not all(map(DATE.fullmatch, _union(named[level])))] or [*range(depth)]
    words = [level for level in choices if _words(_union(named[level]))]
    shares = {level: _recurring(named[level]) for level in choices}
    apart = [level for level in choices if shares[level] <= DISTINCT]
    recurring = [level for level in choices if shares[level] >= RECURRING]
    camera: int | None
    if len(words) == 1 and len(choices) > 1:
        camera, reason = words[0], "its folders are named like cameras"
        others = [level for level in choices if level != camera]
        person = next((level for level in others if level in apart), others[0])
    elif len(apart) == 1 and recurring:
        person, camera, reason = apart[0], recurring[0], "its names recur in train and test, those of persons do not"
    else:
        person, camera, reason = choices[0], next(iter(choices[1:]), None), ""
    if camera is None or camera > person:
        more = len(_union(named[camera])) > len(_union(named[person])) if camera is not None and not reason else False
        doubt = "nothing tells whether persons are above cameras or below; they were taken to be above" if more else ""
        return Levels(person, camera, doubt=doubt)
    return Levels(person, camera, why=f"cameras are above persons: folder level {camera + 1} is the camera, {reason}")


def find_levels_of_one(folders: Collection[tuple[str, ...]]) -> Levels:
    """Tell the levels of data that are not divided into train and test yet.

    Of two levels whose names recur in each other the one with fewer names is the camera; names that do not recur are
    tracks or days of one person.
    """
    levels = find_levels({"train": folders})
    deep = [names for names in folders if len(names) > 1]
    if levels.camera is None or levels.why or _words({n[levels.camera] for n in deep if len(n) > levels.camera}):
        return levels._replace(doubt="")
    above: dict[str, set[str]] = {}
    for names in deep:
        above.setdefault(names[1], set()).add(names[0])
    first, second = len({names[0] for names in deep}), len(above)
    if sum(map(len, above.values())) < RECURS * second:
        return Levels(0, None, "the folders below a person's are tracks or days, since no name recurs")
    if first < second:
        return Levels(1, 0, f"cameras are above persons: the first level has {first} names, the second {second}")
    return Levels(0, 1)


def _names(places: Places, level: int) -> dict[str, set[str]]:
    return {part: {folders[level] for folders in found if len(folders) > level} for part, found in places.items()}


def _union(names: Mapping[str, set[str]]) -> set[str]:
    return set().union(*names.values())


def _words(names: Collection[str]) -> bool:
    return all(map(CAMERA_WORD.fullmatch, names))


def _recurring(names: Mapping[str, set[str]]) -> float:
    """Return the share of names in train and test, of the smaller of both; NaN: one of them has no names."""
    train, test = names.get("train", set()), names.get("query", set()) | names.get("gallery", set())
    return len(train & test) / min(len(train), len(test)) if train and test else nan
