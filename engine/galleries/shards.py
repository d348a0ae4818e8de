"""Tar shards in the convention of WebDataset: members that share a key, `0001.jpg` and `0001.json`, are one image.

A shard is read as a stream and never unpacked. A row has a fault in place of an image that cannot be used.
"""

import json
import logging
import os
import tarfile
from collections.abc import Iterator
from datetime import datetime
from itertools import groupby, islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from fusionreid.dataloading.image_files import MAX_PIXELS, OTHER, SUFFIXES
from fusionreid.dataloading.records import printable
from fusionreid.engine.galleries import stages

SUFFIX = ".tar"
IMAGE_BYTES, TEXT_BYTES = 4 * MAX_PIXELS, 2**20  # of an image without compression; of JSON and headers
TABLE_BYTES, BLOCK_BYTES = 2**27, 2**18  # of images in a table; read at once
READ_WHOLE = b"LKxgX"  # headers of long names and of extended attributes
KEY_MEMBERS = 16  # of one key, held together
TEXTS = "person", "camera", "track"

log = logging.getLogger(__name__)


class Header(tarfile.TarInfo):
    """A header of bounded size; tarfile alone takes a damaged one for the end of a shard."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
        """Read a header. ReadError: it is damaged or too large."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]  # typeshed lacks it
            raise tarfile.ReadError(f"damaged: {error}") from error
        if header.size < 0 or (header.type in READ_WHOLE and header.size > TEXT_BYTES):
            raise tarfile.ReadError(f"damaged: a size of {header.size:,} bytes")
        return header


class Stream:
    """A file that says that it ends early; tarfile alone may go on asking."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def read(self, size: int) -> bytes:
        """Read at most so many bytes. ReadError: there are none."""
        if not (data := self.file.read(size)):
            raise tarfile.ReadError("it ends early")
        return data


class Member(NamedTuple):
    """An image or JSON in a shard, or why it cannot be used; without a name, what is wrong with the shard."""

    name: str
    content: bytes | None
    fault: str | None

    @property
    def key(self) -> str:
        """The name up to the first dot that is in no folder's."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]


def unpacked(images: pa.Table) -> Iterator[pa.Table]:
    """Yield the images of a shard, which the column shard names, in tables for `stages.read`; others as they are."""
    if images.column_names != ["shard"]:
        yield images
        return
    shard, rows, size = os.fsdecode(images["shard"][0].as_py()), list[dict[str, Any]](), 0
    for _, members in groupby(_members(shard), lambda member: member.key):
        while some := list(islice(members, KEY_MEMBERS)):
            about: dict[str, Any] = {}
            for member in some:
                about |= _about(member) if member.name.lower().endswith(".json") else {}
            for name, content, fault in some:
                if not name.lower().endswith(".json"):
                    path = os.fsencode(f"{shard}/{name}" if name else shard)
                    rows.append({"path": path, "image": content, **about, "fault": fault or about.get("fault")})
                    size += len(content or b"")
        if len(rows) >= stages.READ_ROWS or size >= TABLE_BYTES:
            yield pa.Table.from_pylist(rows, stages.SHARD)
            rows, size = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, stages.SHARD)


def _members(shard: str) -> Iterator[Member]:
    others: list[str] = []
    try:
        with stages.open_place(shard) as file, _opened(file) as tar:
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # which tarfile keeps to the end
                suffix = PurePosixPath(member.name).suffix.lower()
                if suffix in SUFFIXES or suffix == ".json":
                    yield _member(tar, member, TEXT_BYTES if suffix == ".json" else IMAGE_BYTES)
                elif suffix not in OTHER and not member.isdir():
                    others.append(member.name)
    except Exception as error:  # tarfile raises whatever a damaged shard leads it to
        reason = getattr(error, "strerror", None) or error
        yield Member("", None, f"the shard cannot be read, or not to its end: {reason}")
    if others:
        log.warning("%s: %d members are no images and were left out, such as %s", printable(shard), len(others),
                    printable(others[0]))  # fmt: skip


def _opened(file: Any) -> tarfile.TarFile:
    stream: Any = Stream(file)
    return tarfile.open(None, "r|", fileobj=stream, bufsize=BLOCK_BYTES, tarinfo=Header)


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> Member:
    if not member.isreg():
        return Member(member.name, None, "a link or a device")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return Member(member.name, None, "its name leads out of the shard")
    if member.size > most:
        return Member(member.name, None, f"{member.size:,} bytes, more than {most:,}")
    file = tar.extractfile(member)
    assert file is not None  # since it is regular
    return Member(member.name, file.read(), None)


def _about(member: Member) -> dict[str, Any]:
    """What a JSON file says of the images of its key, or what is wrong with it."""
    if member.content is None:
        return {"fault": f"its {member.name}: {member.fault}"}
    try:
        given = json.loads(member.content)
        about = {name: given[name] for name in TEXTS if given.get(name) is not None}
        if not all(isinstance(text, str | int) for text in about.values()):
            raise ValueError("person, camera and track must be texts or whole numbers")
        about = {name: str(text) for name, text in about.items()}
        "".join(about.values()).encode()  # JSON may hold half a character
        time = given.get("time") and datetime.fromisoformat(given["time"])
        if time and time.tzinfo is None:
            raise ValueError("time must name its zone, as in 2026-03-01T12:00:00Z")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        return {"fault": f"its {member.name} is not as expected: {error}"}
    return {**about, "time": time}
