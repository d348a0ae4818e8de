"""DATASETS.ON_BAD: the rule for image files that cannot be used. OUTPUT_DIR/bad_images.json names them all.

`error` ends the run. `skip` goes on while at most one file in a thousand is bad, or one in a smaller set: in training
another image of the same person replaces it, at the same position, so that the epoch's plan stays as it is; query and
gallery lose the image.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fusionreid.dataloading.dataset_warnings import dataset_warnings
from fusionreid.dataloading.image_files import read_file
from fusionreid.dataloading.index import Entry, inspect_file, mark_bad, reason, scan
from fusionreid.dataloading.records import PARTS, DataError, Record, Split, printable
from fusionreid.files import locked, write_json

FILE = "bad_images.json"
TOLERATED = 1000  # one bad file in so many, with `skip`; one in any set
NAMED = 20  # in a message

log = logging.getLogger(__name__)
Line = tuple[str, str, str, Record | None]  # part, path, reason, replacement
LINES = TypeAdapter(list[dict[str, str | None]])  # of the list on the disk


@dataclass
class BadImages:
    """The rule of one run: `check` before its first step, `report_late` during it. The main rank writes the log."""

    on_bad: str = "error"  # or skip
    folder: Path | None = None  # OUTPUT_DIR; None: no list is written
    main: bool = True
    total: int = 0  # files checked
    members: tuple[Split, ...] = ()  # data sets, once checked
    entries: Mapping[str, Entry] = field(default_factory=dict)  # of the files checked

    def check(self, split: Split, parts: Sequence[str] = PARTS, decode: Callable[[str], object] | None = None) -> Split:
        """Return the split without the files that cannot be used. DataError: the rule forbids to go on without them.

        All files are checked, since the share that may be bad is one of the whole data set; only those of `parts`
        are replaced or left out. `decode` as for `scan`.
        """
        records: dict[str, tuple[Record, ...]] = {part: getattr(split, part) for part in PARTS}
        entries: dict[str, Entry] = {}
        for one in split.members:
            entries |= scan(one.root, split.paths & one.paths, decode)
        self.entries = entries
        faults = {path: entry.fault for path, entry in entries.items() if entry.fault}
        self.members, self.total = split.members, len(entries)
        goes_on = self.on_bad == "skip" and len(faults) <= self._tolerated
        replacements = _replacements(split.train, faults) if goes_on and "train" in parts else {}
        split = replace(split, warnings=(*split.warnings, *dataset_warnings(entries, split)))
        if self.main:
            for warning in split.warnings:
                log.warning("%s: %s", split.name, warning)
            bad = [(part, i, r) for part in PARTS for i, r in enumerate(records[part]) if r.path in faults]
            self._write(
                [(part, r.path, faults[r.path], replacements.get(i) if part == "train" else None) for part, i, r in bad]
            )
        counts = {part: sum(record.path in faults for record in records[part]) for part in parts}
        if not any(counts.values()):
            return split
        if not goes_on:
            raise DataError(self._refusal(faults))
        used: dict[str, Any] = {part: tuple(r for r in records[part] if r.path not in faults) for part in parts}
        if "train" in parts:
            used["train"] = tuple(replacements.get(position, record) for position, record in enumerate(split.train))
        note = f"bad image files left out: {', '.join(f'{count} of {part}' for part, count in counts.items())}"
        if self.main:
            log.warning("%s: %s; %s names them", split.name, note, self._list)
        left_out = {reason: [*paths] for reason, paths in split.left_out.items()}
        for path in sorted({record.path for part in parts for record in records[part]} & faults.keys()):
            left_out.setdefault(f"a bad image file: {faults[path]}", []).append(path)
        account = {reason: tuple(paths) for reason, paths in left_out.items()}
        if split.tested:
            used["tested"] = tuple(_without(one, faults) for one in split.tested)
        return replace(split, **used, left_out=account, note="; ".join(filter(None, [split.note, note])))

    def check_images(self, records: Sequence[Record]) -> tuple[Record, ...]:
        """Return those images of no data set that can be used, or raise DataError; no index is written."""
        faults = {record.path: fault for record in records if (fault := inspect_file(record.path).fault)}
        self.total = len(records)
        if faults and not (self.on_bad == "skip" and len(faults) <= self._tolerated):
            raise DataError(self._refusal(faults))
        if faults and self.main:
            log.warning(
                "image files left out: %s", ", ".join(f"{printable(path)}: {why}" for path, why in faults.items())
            )
        return tuple(record for record in records if record.path not in faults)

    def report_late(self, record: Record, error: BaseException, replacement: Record | None) -> None:
        """Record a training file that turned bad. DataError: it has no replacement, or too many have turned bad."""
        why = reason(error)
        if getattr(error, "errno", None) is None:  # what a disk says may pass
            for one in self.members:
                if record.path in one.paths:
                    mark_bad(one.root, record.path, why)
        count = self._write([("train", record.path, why, replacement)], more=True)
        if replacement is None:
            choice = "" if self.on_bad == "skip" else ", or set DATASETS.ON_BAD skip"
            raise DataError(f"cannot read the image {printable(record.path)}: {why}; replace it or take it out{choice}")
        log.warning(
            "cannot read the image %s: %s; %s replaces it", printable(record.path), why, printable(replacement.path)
        )
        if count > self._tolerated:
            raise DataError(self._refusal({record.path: why}, count))

    def _refusal(self, faults: Mapping[str, str], count: int = 0) -> str:
        """Compose the message: count, first names, remedy; `count` if more are bad than in `faults`."""
        count = count or len(faults)
        named = [f"  {printable(path)}: {fault}" for path, fault in sorted(faults.items())[:NAMED]]
        more = [f"  and {count - len(named):,} more"] if count > len(named) else []
        remedy = "replace them or take them out" + (f"; {self._list} names all" if self.folder else "")
        if self.on_bad == "skip":
            remedy += f"; DATASETS.ON_BAD skip tolerates one file in {TOLERATED:,}, and one in any data set"
        elif count <= self._tolerated:
            remedy += "; or set DATASETS.ON_BAD skip"
        return "\n".join([f"{count:,} of {self.total:,} image files cannot be used:", *named, *more, remedy])

    @property
    def _tolerated(self) -> int:
        return max(1, self.total // TOLERATED)

    @property
    def _list(self) -> str:
        return str((self.folder or Path()) / FILE)

    def _write(self, lines: Sequence[Line], *, more: bool = False) -> int:
        """Write the list, or add to it, and return how many files it names."""
        if self.folder is None or not (lines or (self.folder / FILE).exists()):
            return len(lines)
        named = [
            {
                "part": part,
                "path": printable(path),
                "reason": why,
                "replacement": printable(other.path) if other else None,
            }
            for part, path, why, other in lines
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / f".{FILE}.lock"):  # every rank may have something to add
            if more:
                with suppress(OSError, ValueError):
                    named = LINES.validate_json(read_file(str(self.folder / FILE))) + named
            write_json(self.folder / FILE, named)
        return len({line.get("path") for line in named})


def _without(split: Split, faults: Mapping[str, str]) -> Split:
    """Return a data set without these queries and gallery images."""
    kept = {part: tuple(r for r in getattr(split, part) if r.path not in faults) for part in ("query", "gallery")}
    return replace(split, query=kept["query"], gallery=kept["gallery"])


def replacement_candidates(records: Sequence[Record], position: int) -> list[int]:
    """Return the other images of a record's person in the order of preference: the same camera first, then by place."""
    person, camera, path = records[position].person, records[position].camera, records[position].path
    others = [i for i, record in enumerate(records) if record.person == person and record.path != path]
    return sorted(others, key=lambda i: (records[i].camera != camera, (i - position) % len(records)))


def _replacements(records: Sequence[Record], faults: Mapping[str, str]) -> dict[int, Record]:
    """Return the replacement for the position of every bad file."""
    found = {}
    for position, record in enumerate(records):
        if record.path in faults:
            good = [i for i in replacement_candidates(records, position) if records[i].path not in faults]
            if not good:
                raise DataError(
                    f"cannot use {printable(record.path)}: {faults[record.path]}; its person has no other image to "
                    "replace it: repair the file or take the person out"
                )
            found[position] = records[good[0]]
    return found
