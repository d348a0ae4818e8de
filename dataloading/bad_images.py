"""DATASETS.ON_BAD: what becomes of image files that cannot be used. All are named in OUTPUT_DIR/bad_images.json.

`error` ends the run. `skip` goes on while at most one file in a thousand is bad: in training another image of the same
person stands in, at the same position, so that the plan of an epoch stays what it is; query and gallery lose the image.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusionreid.dataloading.dataset_warnings import oddities
from fusionreid.dataloading.index import condemn, describe, look, scan
from fusionreid.dataloading.records import PARTS, DataError, Record, Split, shown
from fusionreid.files import locked, write_json

FILE = "bad_images.json"
TOLERATED = 1000  # one bad file in so many, with `skip`
NAMED = 20  # in a message

log = logging.getLogger(__name__)
Line = tuple[str, str, str, Record | None]  # part, path, reason, what stands in


@dataclass
class BadImages:
    """The rule of one run: `check` before its first step, `late` during it; what `check` finds, the main rank tells."""

    on_bad: str = "error"  # or skip
    folder: Path | None = None  # OUTPUT_DIR; None: no list is written
    main: bool = True
    total: int = 0  # files checked
    root: str = ""  # of the data set, once checked

    def check(self, split: Split, parts: Sequence[str] = PARTS, decode: Callable[[str], object] | None = None) -> Split:
        """The split as far as it can be used; DataError if files of `parts` cannot and the rule is against going on.

        All files are looked at, since the share that may be bad is one of the whole data set. `decode` as for `scan`.
        """
        records: dict[str, tuple[Record, ...]] = {part: getattr(split, part) for part in PARTS}
        entries = scan(split.root, [record.path for part in PARTS for record in records[part]], decode)
        faults = {path: entry.fault for path, entry in entries.items() if entry.fault}
        self.root, self.total = split.root, len(entries)
        goes_on = self.on_bad == "skip" and len(faults) * TOLERATED <= self.total
        stand_ins = _stand_ins(split.train, faults) if goes_on and "train" in parts else {}
        if self.main:
            for oddity in oddities(entries, {part: [record.path for record in records[part]] for part in PARTS}):
                log.warning("%s: %s", split.name, oddity)
            self._write([
                (part, record.path, faults[record.path], stand_ins.get(position) if part == "train" else None)
                for part in PARTS for position, record in enumerate(records[part]) if record.path in faults
            ])  # fmt: skip
        counts = {part: sum(record.path in faults for record in records[part]) for part in parts}
        if not any(counts.values()):
            return split
        if not goes_on:
            raise DataError(self._refusal(faults))
        used: dict[str, Any] = {part: tuple(r for r in records[part] if r.path not in faults) for part in parts}
        if "train" in parts:
            used["train"] = tuple(stand_ins.get(position, record) for position, record in enumerate(split.train))
        note = f"bad image files passed over: {', '.join(f'{count} of {part}' for part, count in counts.items())}"
        if self.main:
            log.warning("%s: %s; %s names them", split.name, note, self._list)
        return replace(split, **used, note="; ".join(filter(None, [split.note, note])))

    def check_images(self, records: Sequence[Record]) -> tuple[Record, ...]:
        """Images of no data set as far as they can be used, or DataError; header and end are read, nothing is kept."""
        faults = {record.path: fault for record in records if (fault := look(record.path).fault)}
        self.total = len(records)
        if faults and not (self.on_bad == "skip" and len(faults) * TOLERATED <= self.total):
            raise DataError(self._refusal(faults))
        if faults and self.main:
            log.warning(
                "image files passed over: %s", ", ".join(f"{shown(path)}: {why}" for path, why in faults.items())
            )
        return tuple(record for record in records if record.path not in faults)

    def late(self, record: Record, error: BaseException, instead: Record | None) -> None:
        """Name a training file that turned bad; DataError if nothing stands in for it or too many have turned bad."""
        reason = describe(error)
        if self.root and getattr(error, "errno", None) is None:  # what a disk says may pass
            condemn(self.root, record.path, reason)
        count = self._write([("train", record.path, reason, instead)], more=True)
        if instead is None:
            choice = "" if self.on_bad == "skip" else ", or set DATASETS.ON_BAD skip"
            raise DataError(f"cannot read the image {shown(record.path)}: {reason}; replace it or take it out{choice}")
        log.warning("cannot read the image %s: %s; %s stands in", shown(record.path), reason, shown(instead.path))
        if count * TOLERATED > self.total:
            raise DataError(self._refusal({record.path: reason}, count))

    def _refusal(self, faults: Mapping[str, str], count: int = 0) -> str:
        """How many, the first names, the remedy; `count` where more are bad than `faults` says."""
        count = count or len(faults)
        named = [f"  {shown(path)}: {fault}" for path, fault in sorted(faults.items())[:NAMED]]
        more = [f"  and {count - len(named):,} more"] if count > len(named) else []
        remedy = "replace them or take them out" + (f"; {self._list} names all" if self.folder else "")
        if self.on_bad == "skip":
            remedy += f"; DATASETS.ON_BAD skip bears with one file in {TOLERATED:,}"
        elif count * TOLERATED <= self.total:
            remedy += "; or set DATASETS.ON_BAD skip"
        return "\n".join([f"{count:,} of {self.total:,} image files cannot be used:", *named, *more, remedy])

    @property
    def _list(self) -> str:
        return str((self.folder or Path()) / FILE)

    def _write(self, lines: Sequence[Line], *, more: bool = False) -> int:
        """Write the list, or add to it; how many files it then names."""
        if self.folder is None or not (lines or (self.folder / FILE).exists()):
            return len(lines)
        named = [
            {"part": part, "path": shown(path), "reason": reason, "instead": shown(other.path) if other else None}
            for part, path, reason, other in lines
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / f".{FILE}.lock"):  # every rank may have something to add
            if more:
                with suppress(OSError, ValueError):
                    named = json.loads((self.folder / FILE).read_text(encoding="utf-8")) + named
            write_json(self.folder / FILE, named)
        return len({line["path"] for line in named})


def candidates(records: Sequence[Record], position: int) -> list[int]:
    """The other images of a record's person, in the order in which they stand in: its camera's first, then by place."""
    person, camera, path = records[position].person, records[position].camera, records[position].path
    others = [i for i, record in enumerate(records) if record.person == person and record.path != path]
    return sorted(others, key=lambda i: (records[i].camera != camera, (i - position) % len(records)))


def _stand_ins(records: Sequence[Record], faults: Mapping[str, str]) -> dict[int, Record]:
    """For the position of every bad file the record that stands in."""
    found = {}
    for position, record in enumerate(records):
        if record.path in faults:
            good = [i for i in candidates(records, position) if records[i].path not in faults]
            if not good:
                raise DataError(
                    f"cannot use {shown(record.path)}: {faults[record.path]}; its person has no other image to stand "
                    "in for it: replace the file or take the person out"
                )
            found[position] = records[good[0]]
    return found
