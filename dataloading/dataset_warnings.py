"""Warnings about a data set: multi-frame files, extreme aspect ratios, duplicates across its parts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest

from fusionreid.dataloading.index import Entry
from fusionreid.dataloading.records import open_file, printable

SLENDER = 10  # a side this many times the other surely shows no person
NAMED = 10
BLOCK = 1 << 20  # bytes compared at a time


def dataset_warnings(entries: Mapping[str, Entry], paths: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield a line for every kind of warning that occurs; `paths` holds those of train, query and gallery."""
    good = {path: entry for path, entry in entries.items() if not entry.fault}
    if multi_frame := [path for path, entry in good.items() if entry.multi_frame]:
        yield f"{len(multi_frame):,} files hold several frames, the first is used: {_names(multi_frame)}"
    if slender := [p for p, e in good.items() if max(e.width, e.height) > SLENDER * min(e.width, e.height)]:
        yield f"{len(slender):,} images are over {SLENDER} times as long as wide or as wide as long: {_names(slender)}"
    query, gallery, train = ([p for p in paths.get(part, ()) if p in good] for part in ("query", "gallery", "train"))
    if both := duplicates(good, query, gallery):
        yield f"{len(both):,} gallery images are queries too, byte for byte: {_names(other for _, other in both)}"
    if leaks := duplicates(good, train, [*query, *gallery]):
        pairs = _names(f"{printable(one)} = {printable(other)}" for one, other in leaks)
        yield f"{len(leaks):,} test images are in train too, byte for byte, which flatters every measure: {pairs}"


def duplicates(entries: Mapping[str, Entry], some: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of a path of `some` and one of `others` that hold the same bytes."""
    by_fingerprint = {entries[path].fingerprint: path for path in some}
    pairs = ((by_fingerprint.get(entries[path].fingerprint), path) for path in others)
    return [(one, other) for one, other in pairs if one is not None and _same_bytes(one, other)]


def _same_bytes(one: str, other: str) -> bool:
    try:
        with open_file(one) as a, open_file(other) as b:
            blocks = zip_longest(iter(lambda: a.read(BLOCK), b""), iter(lambda: b.read(BLOCK), b""))
            return all(left == right for left, right in blocks)
    except OSError:  # gone since
        return False


def _names(names: Iterable[str]) -> str:
    listed = [printable(name) for name in names]
    return ", ".join(listed[:NAMED]) + (", ..." if len(listed) > NAMED else "")
