"""Levels of folders: which one names the person and which one the camera, told apart by the data."""

import re
from collections.abc import Collection, Mapping
from math import nan
from typing import NamedTuple

CAMERA_WORD = re.compile(r"(?:c|cam|camera)[ _.-]*\d+", re.IGNORECASE)
PERSON_WORD = re.compile(r"(?:p|pid|id|person|identity|subject)[ _.-]*\d+|0\d{3,}", re.IGNORECASE)
OCCASION = re.compile(  # a day, a time or a track: neither a person nor a camera
    r"(?:19|20)\d\d[-_. ]?\d\d[-_. ]?\d\d.*|\d{1,2}[-_. ]\d{1,2}[-_. ](?:19|20)?\d\d|[ap]m|\d{1,2}h?[-_:]\d\d"
    r"|(?:mon|tues|wednes|thurs|fri|satur|sun)day|morning|noon|afternoon|evening|night"
    r"|(?:track|tracklet|clip|seq|sequence|video|session|visit|day|week|shot)[ _.-]*\d+",
    re.IGNORECASE,
)
RECURS = 1.5  # folders above a name, on average, where it names a camera
CLEAR = 2  # times as many persons as cameras leave no doubt which is which
LEVELS = 4  # that are looked at; folders further down only group images
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
    depth = _depth(deep)
    if depth == 1:
        names = {folders[0] for found in places.values() for folders in found if folders}
        doubt = "folders named like cameras are read as persons" if names and _words(names) else ""
        return Levels(0, None, doubt=doubt)
    named = [_names(deep, level) for level in range(depth)]
    choices = _choices(named)
    shares = {level: _recurring(named[level]) for level in choices}
    apart = [level for level in choices if shares[level] <= DISTINCT]
    recurring = [level for level in choices if shares[level] >= RECURRING]
    camera: int | None
    if (worded := _worded(named, choices)) is not None:
        camera, reason = worded, "its folders are named like cameras"
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
    deep = {"": [names for names in folders if len(names) > 1]}
    depth = _depth(deep)
    named = [_names(deep, level) for level in range(depth)]
    choices = _choices(named)
    if depth == 1 or len(choices) == 1:
        return find_levels({"": folders})._replace(person=choices[0] if depth > 1 else 0)
    if _worded(named, choices) is not None:
        return find_levels({"": folders})
    one, two = choices[:2]
    pairs = {(names[one], names[two]) for names in deep[""] if len(names) > two}
    first, second = len({above for above, _ in pairs}), len({below for _, below in pairs})
    if len(pairs) < RECURS * second:
        return Levels(one, None, "the folders below a person's are tracks or days, since no name recurs")
    above, below = (all(map(PERSON_WORD.fullmatch, _union(named[level]))) for level in (one, two))
    clear = max(first, second) >= CLEAR * min(first, second)
    is_above = first >= second if clear or above == below else above
    doubt = "" if clear or above != below else (
        f"only their numbers tell persons from cameras: {first} names of folders above, {second} below; those "
        f"{'above' if is_above else 'below'} were taken for persons. If they are cameras, name them cam1, cam2, ..., "
        "or make a list"
    )  # fmt: skip
    if is_above:
        return Levels(one, two, doubt=doubt)
    text = f"cameras are above persons: the folders of level {one + 1} have {first} names, those below them {second}"
    return Levels(two, one, text, doubt)


def _depth(deep: Places) -> int:
    return min(LEVELS, max((len(folders) for found in deep.values() for folders in found), default=1))


def _choices(named: list[dict[str, set[str]]]) -> list[int]:
    """Return the levels that may name persons or cameras."""
    levels = range(len(named))
    return [n for n in levels if not all(map(OCCASION.fullmatch, _union(named[n])))] or [*levels]


def _worded(named: list[dict[str, set[str]]], choices: list[int]) -> int | None:
    """Return the level whose folders are named like cameras, if it is the only one and leaves another."""
    words = [level for level in choices if _words(_union(named[level]))]
    return words[0] if len(words) == 1 and len(choices) > 1 else None


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
