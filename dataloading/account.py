"""Account of a data set: what was found, used and left out, as JSON; and a list of what is sound in it."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.dataset_warnings import dataset_warnings, is_same_file
from fusionreid.dataloading.datasets.csv_list import COLUMNS
from fusionreid.dataloading.image_files import find_files
from fusionreid.dataloading.index import Entry
from fusionreid.dataloading.records import PARTS, Record, Split, is_worth_a_warning, printable
from fusionreid.files import atomic_write


def account_as_json(
    split: Split, entries: Mapping[str, Entry] | None = None, wrong: Sequence[str] = ()
) -> dict[str, Any]:
    """Return `found`, `used`, `left_out`, `persons`, `cameras`, `parts`, `warnings` and `verdict`.

    Persons and cameras are names; `left_out` holds the paths by reason. `entries` are what the files themselves say.
    The verdict is wrong if there are faults that would stop a training, `wrong`, else ok or warning.
    """
    entries = entries or {}
    faults = {path: entry.fault for path, entry in entries.items() if entry.fault}
    records = [record for part in PARTS for record in getattr(split, part) if record.path not in faults]
    left_out = {reason: [*paths] for reason, paths in split.left_out.items()}
    for path, fault in sorted(faults.items()):
        left_out.setdefault(f"a bad image file: {fault}", []).append(path)
    warnings = [*wrong, *split.warnings, *(dataset_warnings(entries, split) if entries else ())]
    doubtful = warnings or is_worth_a_warning(left_out)
    persons, cameras = sorted({record.person for record in records}), sorted({record.camera for record in records})
    return {
        "name": split.name,
        "root": printable(split.root),
        "found": split.found,
        "used": len({record.path for record in records}),
        "left_out": {reason: [printable(path) for path in paths] for reason, paths in left_out.items()},
        "parts": {part: sum(r.path not in faults for r in getattr(split, part)) for part in PARTS},
        "persons": [printable(split.person_names.get(person, str(person))) for person in persons],
        "cameras": [printable(split.camera_names[camera]) for camera in cameras if camera in split.camera_names],
        "warnings": [printable(warning) for warning in warnings],
        "verdict": "wrong" if wrong else "warning" if doubtful else "ok",
    }


def refusal_as_json(cfg: DatasetsConfig, error: Exception) -> dict[str, Any]:
    """Return the same account of a data set that cannot be used: all that was found is left out, verdict wrong."""
    roots = list(dict.fromkeys(Path(one.ROOT_DIR).expanduser() for one in (*cfg.sets, *cfg.test_sets)))
    account: dict[str, list[str]] = {}
    for root in filter(Path.is_dir, roots):
        found, left_out = find_files(root)
        for reason, paths in {**({str(error).splitlines()[0]: found} if found else {}), **left_out}.items():
            account.setdefault(reason, []).extend(map(printable, paths))
    return {
        "name": " + ".join(str(one.NAMES) for one in cfg.sets),
        "root": ", ".join(map(printable, roots)),
        "found": sum(map(len, account.values())),
        "used": 0,
        "left_out": account,
        "parts": dict.fromkeys(PARTS, 0),
        "persons": [],
        "cameras": [],
        "warnings": str(error).splitlines(),
        "verdict": "wrong",
    }


def sound_records(split: Split, entries: Mapping[str, Entry]) -> dict[str, list[Record]]:
    """Return the records by part without bad files, copies of an image, and images that are given to two persons."""
    first: dict[str, list[Record]] = {}  # by fingerprint, one of each content
    disputed: set[str] = set()
    kept: dict[str, list[Record]] = {part: [] for part in PARTS}
    for part in PARTS:
        for record in getattr(split, part):
            if entries[record.path].fault:
                continue
            alike = first.setdefault(entries[record.path].fingerprint, [])
            if other := next((other for other in alike if is_same_file(other.path, record.path)), None):
                disputed |= {other.path} if other.person != record.person else set()
            else:
                alike.append(record)
                kept[part].append(record)
    return {part: [record for record in records if record.path not in disputed] for part, records in kept.items()}


def write_clean(split: Split, file: Path, entries: Mapping[str, Entry], *, with_parts: bool) -> str:
    """Write the list of what is used and sound, and say what it has; without parts persons are divided anew."""
    records = sound_records(split, entries)
    write_list(split, file, records, with_parts=with_parts)
    persons = {record.person for part in records.values() for record in part}
    count = sum(map(len, records.values()))
    return f"{count:,} of {split.found:,} images, {len(persons):,} persons: train --data {printable(file)}"


def write_list(
    split: Split, file: Path, records: Mapping[str, Sequence[Record]] | None = None, *, with_parts: bool = True
) -> None:
    """Write a split, or these of its records by part, as a list for DATASETS.NAMES csv, paths absolute."""
    text = io.StringIO()
    rows = csv.writer(text)
    width = len(COLUMNS) if with_parts else len(COLUMNS) - 1
    rows.writerow([*COLUMNS][:width])
    for part in PARTS:
        for record in records[part] if records else getattr(split, part):
            person, camera = split.person_names[record.person], split.camera_names.get(record.camera, "")
            rows.writerow([os.path.abspath(record.path), person, camera, part][:width])
    with atomic_write(file) as out:
        out.write(text.getvalue().encode("utf-8", "surrogateescape"))
