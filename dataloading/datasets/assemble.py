"""Rows of any reader to a `Split`: the rules about persons, cameras and parts, in one place for all data sets."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from fusionreid.dataloading.datasets.names import (
    camera_key,
    is_distractor,
    is_name,
    is_nobody,
    numbered,
    person_key,
    spellings,
    told_spellings,
)
from fusionreid.dataloading.records import JUNK, PARTS, DataError, LeftOut, Record, Split, printable

UNNAMED = "of nobody known: the person's name is nan, none, unknown or the like"
UNSEARCHED = "distractors outside the gallery: they are many persons, so that none can be learnt or searched"
NO_CAMERAS = "no cameras named: train and query count as camera 0, gallery as camera 1, so that no match is left out"
NAMED = 10
MANY = 100  # cameras that a data set surely does not have, if each took only a few images
FEW = 5


class Row(NamedTuple):
    """One image as a reader found it."""

    path: str  # absolute
    person: str
    camera: str | None  # None: not named
    part: str


class Published(NamedTuple):
    """Numbers that a published data set fixes: cameras are 1..`cameras`, persons are the numbers in the names."""

    cameras: int
    persons_recur: bool = True  # a person's number in train and in test is the same person


def assemble(
    name: str,
    root: str,
    rows: Sequence[Row],
    left_out: LeftOut,
    *,
    note: str = "",
    warnings: Sequence[str] = (),
    published: Published | None = None,
) -> Split:
    """Number persons and cameras, leave out junk, and check the parts against each other.

    Own persons are numbered from 1 over all parts; a person 0 that only the gallery has is a distractor. Own cameras
    are numbered from 0 over all parts. Both in the order of their names, which the split keeps. DataError holds every
    fault.
    """
    left_out, told, faults = dict(left_out), list(warnings), two_persons(rows)
    rows = sift(rows, left_out)
    if len(once := list(dict.fromkeys(rows))) < len(rows):
        told.append(f"{len(rows) - len(once):,} images are named more than once in the same part, and count once")
    rows, camera_fault, camera_note = _without_cameras(sorted(once, key=lambda row: PARTS.index(row.part)))
    spelt = spellings(((r.person, r.part) for r in rows), person_key)
    spelt_cameras = spellings(((r.camera or "", r.part) for r in rows), camera_key)
    (person_faults, person_warnings), (camera_faults, camera_warnings) = (
        told_spellings("person", spelt),
        told_spellings("camera", spelt_cameras),
    )
    persons, cameras = spelt.chosen, spelt_cameras.chosen
    if faults := [*faults, *camera_fault, *person_faults, *camera_faults]:
        raise DataError("\n".join(f"{name}: {fault}" for fault in faults))
    person_number = _person_numbers(rows, persons, published)
    camera_number = _camera_numbers({cameras[r.camera or ""] for r in rows}, published)
    parts: dict[str, list[Record]] = {part: [] for part in PARTS}
    for row in sorted(rows, key=lambda row: row.path):
        person, camera = person_number[persons[row.person]], camera_number[cameras[row.camera or ""]]
        parts[row.part].append(Record(row.path, person, camera))
    person_names = {number: text for text, number in reversed(person_number.items())}
    camera_names = {} if camera_note else {number: text for text, number in camera_number.items()}
    told += [*person_warnings, *camera_warnings, *_cross_check(parts, person_names, published)]
    told += [] if camera_note else _odd_cameras(len(rows), len(camera_number))
    return Split(
        name,
        root,
        tuple(parts["train"]),
        tuple(parts["query"]),
        tuple(parts["gallery"]),
        note="; ".join(filter(None, [note, camera_note])),
        left_out={reason: tuple(paths) for reason, paths in left_out.items()},
        warnings=tuple(told),
        person_names=person_names,
        camera_names=camera_names,
    )


def sift(rows: Sequence[Row], left_out: LeftOut) -> list[Row]:
    """Move images of nobody who can be learnt or searched to `left_out`; forget cameras whose name is no name."""
    kept: list[Row] = []
    others: dict[str, set[str]] = {}
    for row in rows:
        if is_nobody(row.person):
            reason = JUNK
        elif not is_name(row.person):
            reason = UNNAMED
        elif is_distractor(row.person) and row.part in ("train", "query"):
            reason = UNSEARCHED
        else:
            kept.append(row if row.camera is None or is_name(row.camera) else row._replace(camera=None))
            continue
        others.setdefault(reason, set()).add(row.path)
    left_out |= {reason: sorted({*left_out.get(reason, ()), *paths}) for reason, paths in others.items()}
    return kept


def two_persons(rows: Sequence[Row]) -> list[str]:
    """Describe the images that are given to two persons, or to two cameras."""
    first: dict[str, Row] = {}
    others: dict[str, list[Row]] = {}  # of the few images with several rows
    for row in rows:
        if first.setdefault(row.path, row) is not row:
            others.setdefault(row.path, [first[row.path]]).append(row)
    faults = []
    for kind, key in (("person", person_key), ("camera", camera_key)):
        named = {path: [getattr(row, kind) or "" for row in same] for path, same in others.items()}
        spelt = {path: {key(name): name for name in names} for path, names in named.items()}
        if twice := {path: names for path, names in spelt.items() if len(names) > 1}:
            texts = ((path, ", ".join(map(repr, sorted(names.values())))) for path, names in twice.items())
            listed = _listed(f"{printable(path)} ({text})" for path, text in texts)
            faults.append(f"{len(twice):,} images belong to two {kind}s: {listed}; each shows one")
    return faults


def _without_cameras(rows: Sequence[Row]) -> tuple[list[Row], list[str], str]:
    """Give cameras to rows if none names one; a fault if only some do; a note."""
    nameless = [row.path for row in rows if row.camera is None]
    if not nameless:
        return list(rows), [], ""
    if len(nameless) < len(rows):
        fault = (
            f"{len(nameless):,} of {len(rows):,} images name no camera, the first is {printable(nameless[0])}; name it "
            "for all or for none"
        )
        return list(rows), [fault], ""
    return [row._replace(camera="1" if row.part == "gallery" else "0") for row in rows], [], NO_CAMERAS


def _person_numbers(rows: Sequence[Row], spelling: Mapping[str, str], published: Published | None) -> dict[str, int]:
    names = {spelling[row.person] for row in rows}
    if published:
        return {name: int(name) for name in sorted(names)}
    elsewhere = {spelling[row.person] for row in rows if row.part != "gallery"}
    nobody = [name for name in names - elsewhere if person_key(name) == "0" or is_distractor(name)]
    return {**dict.fromkeys(nobody, 0), **numbered(names - {*nobody}, 1)}


def _camera_numbers(names: set[str], published: Published | None) -> dict[str, int]:
    if published and all(name.isdecimal() and 1 <= int(name) <= published.cameras for name in names):
        return {name: int(name) - 1 for name in names}
    return numbered(names, 0)


def _cross_check(
    parts: Mapping[str, Sequence[Record]], names: Mapping[int, str], published: Published | None
) -> list[str]:
    """Compare the parts: persons in train and test, and queries that can have no match."""
    train, query, gallery = ({record.person for record in parts[part]} for part in PARTS)
    found = []
    if (both := train & (query | gallery) - {0}) and not (published and not published.persons_recur):
        found.append(
            f"{len(both):,} persons to train on are also in query or gallery, which flatters every measure: "
            f"{_listed(repr(names[p]) for p in sorted(both))}; put all images of a person in train, or none"
        )
    if lost := [record for record in parts["query"] if record.person not in gallery]:
        missing = [names[p] for p in sorted({record.person for record in lost})]
        close = {name: get_close_matches(name, [names[p] for p in gallery], n=1) for name in missing[:NAMED]}
        texts = (f"{name!r}" + (f" (gallery has {close[name][0]!r})" if close.get(name) else "") for name in missing)
        found.append(
            f"{len(lost):,} of {len(parts['query']):,} queries show persons that the gallery lacks, and are left out "
            f"of every measure: {_listed(texts)}; are persons named alike in query and gallery?"
        )
    seen_by = defaultdict(set)
    for record in parts["gallery"]:
        seen_by[record.person].add(record.camera)
    if alone := [r for r in parts["query"] if r.person in gallery and seen_by[r.person] == {r.camera}]:
        texts = (repr(names[p]) for p in sorted({record.person for record in alone}))
        found.append(
            f"{len(alone):,} of {len(parts['query']):,} queries have their person in the gallery only from their own "
            f"camera, and are left out of every measure: {_listed(texts)}"
        )
    return found


def _odd_cameras(images: int, cameras: int) -> list[str]:
    if cameras <= MANY or images >= FEW * cameras:
        return []
    return [
        f"{cameras:,} cameras took {images:,} images: is what was read as the camera a date or a running number? Name "
        "cameras by a folder below the person's, or in a list"
    ]


def _listed(texts: Iterable[str]) -> str:
    listed = list(texts)
    return ", ".join(listed[:NAMED]) + (f" and {len(listed) - NAMED:,} more" if len(listed) > NAMED else "")
