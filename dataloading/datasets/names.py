"""Names of persons and cameras: two spellings of one name are found before they split its images."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

NUMBER = re.compile(r"([+-]?)0*(\d{1,18})(?:[.,]0+)?")
CAMERA = re.compile(r"(?:c|cam|camera)[ _.-]*(?=\d)")
NAMED = 10
NOBODY = frozenset({"-1", "junk"})  # persons of boxes that show nobody
DISTRACTORS = frozenset({"distractor", "distractors"})  # people who are not searched; 0 too, if only the gallery has it
NO_NAMES = frozenset(  # how programs and people write that they do not know; Nan, with one capital, is a name
    {"nan", "NaN", "NAN", "none", "None", "NONE", "null", "NULL", "NA", "N/A", "n/a", "#N/A", "<NA>", "?"}
    | {"unknown", "Unknown", "UNKNOWN"}
)


@lru_cache(1 << 16)
def person_key(name: str) -> str:
    """Reduce a name to what it means: `0009`, `9` and `9.0` are one person, as are `Anna` and `anna`."""
    text = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    number = NUMBER.fullmatch(text)
    return f"{'-' if number[1] == '-' else ''}{number[2]}" if number else text


def is_nobody(person: str) -> bool:
    """Tell whether a name marks a box that shows nobody, as `-1` does in Market-1501."""
    return person_key(person) in NOBODY


def is_distractor(person: str) -> bool:
    """Tell whether a word names all the people who are not searched."""
    return person_key(person) in DISTRACTORS


def is_name(text: str) -> bool:
    """Tell whether a text names somebody or something, as nan and unknown do not."""
    return text.strip() not in NO_NAMES


@lru_cache(1 << 16)
def camera_key(name: str) -> str:
    """Reduce a camera's name as `person_key`; `cam1`, `c01` and `1` are one camera."""
    text = person_key(name)
    return person_key(CAMERA.sub("", text, count=1)) if CAMERA.match(text) else text


class Spellings(NamedTuple):
    """Names by the spelling that counts; several spellings of a name are one name, or unclear."""

    chosen: dict[str, str]
    merged: list[dict[str, Counter[str]]]  # spelling -> how often in each part
    unclear: list[dict[str, Counter[str]]]


def spellings(places: Iterable[tuple[str, str]], key: Callable[[str], str]) -> Spellings:
    """Map every name to the spelling that counts.

    `places` are (name, part). Spellings that differ in their Unicode form alone, or never occur in the same part, are
    one name; others in one part may be two, and only their owner knows.
    """
    found: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for name, part in places:
        found[key(name)][name][part] += 1
    chosen = {name: next(iter(names)) for names in found.values() for name in names}
    several = [names for names in found.values() if len(names) > 1]
    unclear = [names for names in several if _share_a_part(names)]
    return Spellings(chosen, [names for names in several if not _share_a_part(names)], unclear)


def told_spellings(kind: str, found: Spellings) -> tuple[list[str], list[str]]:
    """Describe what is unclear and what was merged, in a line each if there is any."""
    unclear = (
        f"{len(found.unclear):,} {kind}s may be spelt in two ways: {_pairs(found.unclear)}; write each of them in one "
        "way, or give different ones names that differ in more than zeros, capitals or a prefix"
    )
    text = f"{len(found.merged):,} {kind}s are spelt in two ways and were taken as one each: {_pairs(found.merged)}"
    return [unclear] if found.unclear else [], [text] if found.merged else []


def _share_a_part(names: Mapping[str, Counter[str]]) -> bool:
    """Tell whether two spellings, Unicode forms aside, occur in one part."""
    by_form: dict[str, set[str]] = defaultdict(set)
    for name, parts in names.items():
        by_form[unicodedata.normalize("NFC", name)] |= parts.keys()
    return sum(map(len, by_form.values())) > len(set().union(*by_form.values()))


def _pairs(several: list[dict[str, Counter[str]]]) -> str:
    texts = [
        " = ".join(
            f"{name!r} ({', '.join(f'{n} in {part}' if part else f'{n}' for part, n in parts.items())})"
            for name, parts in s.items()
        )
        for s in several[:NAMED]
    ]
    return "; ".join(texts) + ("; ..." if len(several) > NAMED else "")


def numbered(names: Iterable[str], start: int) -> dict[str, int]:
    """Number names in the order of their value, numbers before all other names."""

    def order(name: str) -> tuple[int, int, str, str]:
        key = camera_key(name)
        number = NUMBER.fullmatch(key)
        return (0, int(number[1] + number[2]), "", name) if number else (1, 0, name.strip(), name)

    return {name: number for number, name in enumerate(sorted(set(names), key=order), start)}
