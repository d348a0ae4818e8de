"""Warnings about a data set: odd images, and the same image in two places."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest

from fusionreid.dataloading.image_files import open_file
from fusionreid.dataloading.index import Entry
from fusionreid.dataloading.records import Record, Split, printable

SLENDER = 10  # a side this many times the other surely shows no person
NAMED = 10
BLOCK = 1 << 20  # bytes compared at a time


def dataset_warnings(entries: Mapping[str, Entry], split: Split) -> Iterator[str]:
    """Yield a line for every kind of warning that occurs among the usable files of a split."""
    good = {path: entry for path, entry in entries.items() if not entry.fault}
    if multi_frame := [path for path, entry in good.items() if entry.multi_frame]:
        yield f"{len(multi_frame):,} files hold several frames, the first is used: {_names(multi_frame)}"
    if slender := [p for p, e in good.items() if max(e.width, e.height) > SLENDER * min(e.width, e.height)]:
        yield f"{len(slender):,} images are over {SLENDER} times as long as wide or as wide as long: {_names(slender)}"
    if turned := [path for path, entry in good.items() if entry.turned]:
        yield (
            f"{len(turned):,} images ask in their EXIF data to be turned, and are read as they are stored: "
            f"{_names(turned)}; if they show people lying, store them upright"
        )
    train = [record for record in split.train if record.path in good]
    yield from _within(good, "train", train, split.person_names)
    tested: list[str] = []
    for test in split.tests:
        for part in ("query", "gallery"):
            records = [record for record in getattr(test, part) if record.path in good]
            yield from _within(good, part, records, test.person_names)
        query, gallery = ([r.path for r in records if r.path in good] for records in (test.query, test.gallery))
        if both := duplicates(good, query, gallery):
            yield f"{len(both):,} gallery images are queries too, byte for byte: {_names(other for _, other in both)}"
        tested += [*query, *gallery]
    if leaks := duplicates(good, [record.path for record in train], tested):
        pairs = _pairs(leaks)
        yield f"{len(leaks):,} test images are in train too, byte for byte, which flatters every measure: {pairs}"
    yield from few_persons(split)


def few_persons(split: Split) -> Iterator[str]:
    """Yield a line if the test set has too few persons to measure anything."""
    for test in split.tests:
        name, searched = f"{test.label}: " if split.tested else "", {record.person for record in test.query}
        if len(searched | {record.person for record in test.gallery}) == 1:
            right = "every match is right, and mAP 100 %, whatever the model does"
            yield f"{name}query and gallery show one person only: {right}"
        elif len(searched) == 1:
            yield f"{name}all queries show one person: the results are of that person, and say little about the model"


def _within(
    entries: Mapping[str, Entry], part: str, records: Sequence[Record], names: Mapping[int, str]
) -> Iterator[str]:
    """Yield the warnings about equal files in one part, first those of two persons."""
    person = {record.path: record.person for record in records}
    first: dict[str, str] = {}
    equal = []
    for path in person:
        other = first.setdefault(entries[path].fingerprint, path)
        if other != path and is_same_file(other, path):
            equal.append((other, path))
    if two := [pair for pair in equal if person[pair[0]] != person[pair[1]]]:
        told = ((f"{printable(p)} ({names.get(person[p], person[p])})" for p in pair) for pair in two)
        yield (
            f"{len(two):,} images in {part} are given to two persons, byte for byte: "
            f"{_names(' = '.join(pair) for pair in told)}; take out the wrong ones"
        )
    if one := [pair for pair in equal if person[pair[0]] == person[pair[1]]]:
        yield f"{len(one):,} images in {part} are there more than once, byte for byte: {_pairs(one)}"


def duplicates(entries: Mapping[str, Entry], some: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of a path of `some` and one of `others` that hold the same bytes."""
    by_fingerprint = {entries[path].fingerprint: path for path in some}
    pairs = ((by_fingerprint.get(entries[path].fingerprint), path) for path in others)
    return [(one, other) for one, other in pairs if one is not None and is_same_file(one, other)]


def is_same_file(one: str, other: str) -> bool:
    """Tell whether two files hold the same bytes, or are one."""
    try:
        if os.path.samefile(one, other):
            return True
        with open_file(one) as a, open_file(other) as b:
            blocks = zip_longest(iter(lambda: a.read(BLOCK), b""), iter(lambda: b.read(BLOCK), b""))
            return all(left == right for left, right in blocks)
    except OSError:  # gone since
        return False


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return _names(f"{printable(one)} = {printable(other)}" for one, other in pairs)


def _names(names: Iterable[str]) -> str:
    listed = [printable(name) for name in names]
    return ", ".join(listed[:NAMED]) + (", ..." if len(listed) > NAMED else "")
