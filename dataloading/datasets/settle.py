"""What is unclear about own data: it is told, and left out or forgotten, so that the rest can be divided."""

from collections.abc import Callable, Sequence

from fusionreid.dataloading.datasets.assemble import Row, sift, two_persons
from fusionreid.dataloading.datasets.names import camera_key, person_key, spellings, told_spellings
from fusionreid.dataloading.records import LeftOut, printable

FEW = 0.1  # share of images that are left out because they alone name no camera
NO_CAMERA = "its camera is not named, those of the others are"
TWICE = "given to two persons or cameras"
UNCLEAR = "its person may be spelt in two ways"


def settle(rows: Sequence[Row], left_out: LeftOut) -> tuple[list[Row], list[str], list[str]]:
    """Return the sound rows, the faults that their owner must settle, and warnings.

    Images of two persons, and of persons who may be two, are left out; cameras that may be two become one, since a
    match must be by another camera.
    """
    faults, first = two_persons(rows), {row.path: row for row in reversed(rows)}
    twice = {row.path for row in rows if not _agree(row, first[row.path])}
    kept = _keep(sift(rows, left_out), lambda row: row.path not in twice, TWICE, left_out)
    persons = spellings(((row.person, row.part) for row in kept), person_key)
    unclear = {name for names in persons.unclear for name in names}
    kept = _keep(kept, lambda row: row.person not in unclear, UNCLEAR, left_out)
    kept, warnings = _agree_on_cameras(kept, left_out)
    cameras = spellings(((row.camera or "", row.part) for row in kept), camera_key)
    kept = [row._replace(camera=row.camera and cameras.chosen[row.camera]) for row in kept]
    return kept, [*faults, *told_spellings("person", persons)[0], *told_spellings("camera", cameras)[0]], warnings


def _agree(one: Row, other: Row) -> bool:
    same_person = person_key(one.person) == person_key(other.person)
    return same_person and camera_key(one.camera or "") == camera_key(other.camera or "")


def _keep(rows: Sequence[Row], is_kept: Callable[[Row], bool], reason: str, left_out: LeftOut) -> list[Row]:
    if paths := {row.path for row in rows if not is_kept(row)}:
        left_out[reason] = sorted({*left_out.get(reason, ()), *paths})
    return [row for row in rows if is_kept(row)]


def _agree_on_cameras(rows: list[Row], left_out: LeftOut) -> tuple[list[Row], list[str]]:
    """Leave out the few images that name no camera, or forget the cameras if they are many, with a warning."""
    nameless = [row.path for row in rows if row.camera is None]
    if len(nameless) in (0, len(rows)):
        return rows, []
    if len(nameless) <= FEW * len(rows):
        return _keep(rows, lambda row: row.camera is not None, NO_CAMERA, left_out), []
    told = (
        f"{len(nameless):,} of {len(rows):,} images name no camera, the first is {printable(min(nameless))}, so that "
        "cameras are not used at all; name them for all, in folders or in a list"
    )
    return [row._replace(camera=None) for row in rows], [told]
