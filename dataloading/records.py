"""Data sets as the rest of the project sees them, `Split` of `Record`s, and the checks made before the first step."""

import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from fusionreid.errors import ReIDError

PARTS = ("train", "query", "gallery")
LeftOut = dict[str, list[str]]  # reason -> paths
OWN = "folder", "market", "csv"  # readers of own data
UNTRAINED = "to train on, in a data set that is only tested on"
UNTESTED = "query or gallery of a data set that is not tested on"
JUNK, HIDDEN = "junk: person -1", "hidden, or a system's metadata"  # left out of every data set without a warning


class DataError(ReIDError, ValueError):
    """Something about the data that its owner can put right."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image file with its person and camera."""

    path: str  # absolute
    person: int  # number, named by Split.person_names; 0: distractor
    camera: int  # from 0, named by Split.camera_names


@dataclass(frozen=True)
class Split:
    """A data set in its three parts, with an account of every image file that was found.

    `train` may be empty where a model is only evaluated. Names of persons and cameras are as their owner wrote them.
    """

    name: str
    root: str
    train: tuple[Record, ...]
    query: tuple[Record, ...]
    gallery: tuple[Record, ...]
    note: str = ""
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # reason -> paths
    warnings: tuple[str, ...] = ()
    person_names: Mapping[int, str] = field(default_factory=dict)
    camera_names: Mapping[int, str] = field(default_factory=dict)
    sets: tuple["Split", ...] = ()  # of a union: the data sets to train on, as they were read
    tested: tuple["Split", ...] = ()  # of a union: those to test on

    def __post_init__(self) -> None:
        for part in ("query", "gallery"):
            if not getattr(self, part):
                raise DataError(
                    f"{self.name}: no images for {part} in {printable(self.root)}; query and gallery are always "
                    "needed, train as well for training"
                )

    @property
    def label(self) -> str:
        """Name that tells the data set from others: that of its reader, or for own data that of its folder or list."""
        return (self.name in OWN and printable(Path(self.root).stem)) or self.name

    @property
    def members(self) -> tuple["Split", ...]:
        """Data sets of a union, those to train on first; else the split itself."""
        return tuple({one.label: one for one in (*self.sets, *self.tested)}.values()) or (self,)

    @property
    def tests(self) -> tuple["Split", ...]:
        """Data sets whose queries are each searched in their own gallery."""
        return self.tested or (self,)

    @cached_property
    def persons(self) -> tuple[int, ...]:
        """Persons to train on, sorted; the label of a person is its position."""
        return tuple(sorted({record.person for record in self.train}))

    @cached_property
    def labels(self) -> list[int]:
        """Label of the person of every training image."""
        label = {person: position for position, person in enumerate(self.persons)}
        return [label[record.person] for record in self.train]

    @cached_property
    def cameras(self) -> tuple[int, ...]:
        """Cameras seen in training, sorted."""
        return tuple(sorted({record.camera for record in self.train}))

    @property
    def names_of_cameras(self) -> list[str]:
        """Names of the cameras seen in training; one that has none is known by its number, from 1."""
        return [self.camera_names.get(camera, str(camera + 1)) for camera in self.cameras]

    @property
    def num_persons(self) -> int:
        """Number of persons to train on."""
        return len(self.persons)

    @property
    def num_cameras(self) -> int:
        """Rows that an embedding of the training cameras needs."""
        return self.cameras[-1] + 1 if self.train else 0

    @cached_property
    def paths(self) -> set[str]:
        """Files in the three parts."""
        return {record.path for part in PARTS for record in getattr(self, part)}

    @property
    def used(self) -> int:
        """Number of files in the three parts."""
        return len(self.paths)

    @property
    def found(self) -> int:
        """Number of image files found: those used and those left out."""
        return self.used + sum(map(len, self.left_out.values()))

    @property
    def verdict(self) -> Literal["ok", "warning"]:
        """Tell whether the owner should look at the warnings or at what was left out."""
        return "warning" if self.warnings or is_worth_a_warning(self.left_out) else "ok"

    def describe(self) -> str:
        """Table of images, persons and cameras per part, then the files left out by reason."""
        lines = [one.describe() for one in self.members if one is not self]
        lines += [f"{self.name} in {printable(self.root)}", f"{'part':8}{'images':>10}{'persons':>10}{'cameras':>10}"]
        for part in PARTS:
            records = getattr(self, part)
            persons, cameras = {r.person for r in records}, {r.camera for r in records}
            lines.append(f"{part:8}{len(records):>10,}{len(persons):>10,}{len(cameras):>10}")
        lines += [self.note] if self.note else []
        if self.left_out:
            lines.append(f"{self.found:,} image files found, {self.used:,} used; left out:")
            lines += [f"  {len(p):,}: {reason}, such as {printable(p[0])}" for reason, p in self.left_out.items()]
        return "\n".join(lines)


def is_worth_a_warning(left_out: Collection[str]) -> bool:
    """Tell whether there is a reason for leaving images out that their owner may not expect."""
    return bool({*left_out} - {JUNK, HIDDEN, UNTRAINED, UNTESTED})


def printable(path: str | os.PathLike[str]) -> str:
    """Text of a path that every terminal and log can take, whatever bytes its name has."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def check_batch(split: Split, batch_size: int, instances: int, world_size: int = 1, *, balance: bool = False) -> None:
    """Raise DataError unless a batch is P persons x K instances and each rank can take whole persons.

    With `balance` each data set gives equally many of the persons, without repetition.
    """
    if empty := [one for one in split.sets or (split,) if not one.train]:
        raise DataError(
            f"{empty[0].label}: no images for train in {printable(empty[0].root)}; without them it can be evaluated, "
            "but nothing can be trained"
        )
    persons, rest = divmod(batch_size, instances)
    if rest or not persons:
        raise DataError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of DATALOADER.NUM_INSTANCE, got {batch_size} = "
            f"{persons} x {instances} + {rest}; the next is {(persons + 1) * instances}"
        )
    if persons % world_size:
        raise DataError(
            f"each of {world_size} processes takes whole persons of a batch: SOLVER.IMS_PER_BATCH must be a multiple "
            f"of {world_size} x {instances} = {world_size * instances}, got {batch_size} = {persons} x {instances}"
        )
    sets = len(split.sets) if balance and split.sets else 1
    if persons % sets:
        raise DataError(
            f"DATALOADER.BALANCE_SETS: {sets} data sets must give equally many of the {persons} persons of a batch: "
            f"SOLVER.IMS_PER_BATCH must be a multiple of {sets * instances}, got {batch_size}"
        )
    if few := [one for one in split.sets if sets > 1 and one.num_persons < persons // sets]:
        raise DataError(
            f"DATALOADER.BALANCE_SETS: {few[0].label} has {few[0].num_persons} persons to train on, a batch needs "
            f"{persons // sets} of each data set; SOLVER.IMS_PER_BATCH may be at most "
            f"{few[0].num_persons * sets * instances} here"
        )
    if split.num_persons < persons:
        raise DataError(
            f"{split.name} has {split.num_persons} persons to train on, a batch needs {persons} "
            f"({batch_size} images / {instances} per person); SOLVER.IMS_PER_BATCH may be at most "
            f"{split.num_persons * instances} here"
        )


def scarce_persons(split: Split, instances: int) -> int:
    """Count the persons that have fewer training images than a batch takes, so that images repeat."""
    return sum(count < instances for count in Counter(record.person for record in split.train).values())
