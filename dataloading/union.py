"""Several data sets as one: persons and cameras of each are told apart, also where their names are the same."""

import os
from collections.abc import Sequence

from fusionreid.dataloading.records import PARTS, UNTESTED, UNTRAINED, DataError, Record, Split, printable


def unite(trained: Sequence[Split], tested: Sequence[Split]) -> Split:
    """Unite the training images of `trained` with query and gallery of `tested`, which may name the same data sets.

    Names are prefixed with that of their set, unless it is the only one to train on. The account names every file of
    every set.
    """
    members = list({id(one): one for one in (*trained, *tested)}.values())
    _check_apart(members, trained)
    parts: dict[str, list[Record]] = {part: [] for part in PARTS}
    person_names: dict[int, str] = {}
    camera_names: dict[int, str] = {}
    left_out: dict[str, list[str]] = {}
    for one in members:
        used = {"train": one in trained, "query": one in tested, "gallery": one in tested}
        first_person, first_camera = max(person_names, default=-1) + 1, max(camera_names, default=-1) + 1
        prefix = "" if [one] == [*trained] else f"{one.label}/"
        for reason, paths in one.left_out.items():
            left_out.setdefault(reason, []).extend(paths)
        for part in PARTS:
            records = getattr(one, part)
            for path, person, camera in ((r.path, r.person, r.camera) for r in records):
                person_names[first_person + person] = prefix + one.person_names.get(person, str(person))
                camera_names[first_camera + camera] = prefix + one.camera_names.get(camera, str(camera + 1))
                if used[part]:
                    parts[part].append(Record(path, first_person + person, first_camera + camera))
            if records and not used[part]:
                reason = UNTRAINED if part == "train" else UNTESTED
                left_out.setdefault(reason, []).extend(record.path for record in records)
    in_use = {record.path for records in parts.values() for record in records}
    account = {reason: tuple(sorted({*paths} - in_use)) for reason, paths in left_out.items()}
    return Split(
        " + ".join(one.label for one in members),
        os.path.commonpath([one.root for one in members]),
        tuple(parts["train"]),
        tuple(parts["query"]),
        tuple(parts["gallery"]),
        left_out={reason: paths for reason, paths in account.items() if paths},
        warnings=tuple(f"{one.label}: {warning}" for one in members for warning in one.warnings),
        person_names=person_names,
        camera_names=camera_names,
        sets=tuple(trained),
        tested=tuple(tested),
    )


def _check_apart(members: Sequence[Split], trained: Sequence[Split]) -> None:
    """Raise DataError if two sets have one name, or the same images to train on."""
    first: dict[str, Split] = {}
    for one in members:
        if (other := first.setdefault(one.label, one)) is not one:
            roots = " and ".join(printable(each.root) for each in (other, one))
            raise DataError(
                f"DATASETS: two data sets are called {one.label}, in {roots}; name one of them, or give their folders "
                "or lists different names"
            )
    of_path: dict[str, Split] = {}
    for one in trained:
        for record in one.train:
            if (other := of_path.setdefault(record.path, one)) is not one:
                raise DataError(
                    f"DATASETS.NAMES: {other.label} and {one.label} both train on {printable(record.path)}, which "
                    "would make two persons of one; name these images in one set only"
                )
