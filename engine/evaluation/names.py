"""Names of persons and cameras as their owner wrote them, kept with embeddings; cosines as texts."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from fusionreid.dataloading.records import Split, printable

KEY = "names"  # in the source of embeddings


class Names(NamedTuple):
    """Names by number; a number below 0 stands for nobody known, and one without a name for itself."""

    persons: Mapping[int, str] = {}
    cameras: Mapping[int, str] = {}

    @classmethod
    def of(cls, split: Split) -> Self:
        """Names of a data set."""
        return cls(split.person_names, split.camera_names)

    @classmethod
    def from_source(cls, source: Mapping[str, Any]) -> Self:
        """Names that embeddings were stored with, none if that was before names were kept."""
        kept = source.get(KEY)
        persons, cameras = (kept.get(kind) if isinstance(kept, dict) else None for kind in cls._fields)
        return cls(_numbered(persons), _numbered(cameras))

    def as_source(self) -> dict[str, dict[str, dict[str, str]]]:
        """Return the entry of `source` that `from_source` reads."""
        return {KEY: {kind: {str(number): printable(name) for number, name in getattr(self, kind).items()}
                      for kind in self._fields}}  # fmt: skip

    def person(self, number: int) -> str | None:
        """Name of a person."""
        return None if number < 0 else self.persons.get(number, str(number))

    def camera(self, number: int) -> str | None:
        """Name of a camera; cameras without names count from 1."""
        return None if number < 0 else self.cameras.get(number, str(number + 1))


def _numbered(names: object) -> dict[int, str]:
    items = names.items() if isinstance(names, dict) else ()
    return {int(number): str(name) for number, name in items if str(number).isdecimal()}


def cosine_text(cosine: float) -> str:
    """Write a cosine with three significant digits of its difference from 1: near 1 they tell cosines apart."""
    return f"{cosine:.{min(max(3, 2 - math.floor(math.log10(max(1 - cosine, 1e-9)))), 7)}f}"
