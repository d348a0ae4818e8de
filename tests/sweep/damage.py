"""Ways to damage a file: a flipped bit, a cut, something else in its place, JSON that means something else."""

import json
import math
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from fusionreid.dataloading import index
from fusionreid.engine.monitoring.jsonl import is_intact, line_of
from fusionreid.sealed import entries, seal
from fusionreid.weights.checkpoint_files import FORMAT, MANIFEST, STATE

Damage = Callable[[Path], None]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "\x1b[2J\x1b[31m", "\ud800", "\0", "../../etc/passwd", "/dev/zero", "9" * 5000, "e" * 10**5),
    *([], {}, [[]], {"": {}}, [None] * 1000, {"a": 1, "config": 2}),
)


def flip(draw: random.Random) -> Damage:
    """One bit becomes another, as on a failing disk: size and time stay."""

    def damage(path: Path) -> None:
        data, times = bytearray(path.read_bytes()), path.stat()
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    return damage


def cut(draw: random.Random) -> Damage:
    """The end is missing."""
    return lambda path: os.truncate(path, draw.randrange(path.stat().st_size))


def _listening(path: Path) -> None:
    with chdir(path.parent), socket.socket(socket.AF_UNIX) as door:
        door.bind(path.name)  # a long path is none of a socket


PLACES: dict[str, Damage] = {  # in place of the file
    "nothing": lambda path: None,
    "a pipe": os.mkfifo,
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a socket": _listening,
    "zeros": lambda path: path.write_bytes(bytes(999)) and None,
    "lists in lists": lambda path: path.write_bytes(b"[" * 200_000) and None,
    "objects in objects": lambda path: path.write_bytes(b'{"a":' * 100_000) and None,
    "a number of 5000 digits": lambda path: path.write_bytes(b'{"config": ' + b"9" * 5000 + b"}") and None,
}


def replace(place: Damage) -> Damage:
    """Something else stands where the file was."""

    def damage(path: Path) -> None:
        path.unlink()
        place(path)

    return damage


def is_json(path: Path) -> bool:
    """Whether a file is JSON, or lines of JSON."""
    return path.suffix in (".json", ".jsonl")


@contextmanager
def deeply() -> Iterator[None]:
    """Room for code of ours that writes what is nested 900 deep; the commands read it without."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20 * before)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def forge(draw: random.Random) -> Damage:
    """Other JSON, whose digests are made to fit, as a forger can."""

    @deeply()
    def damage(path: Path) -> None:
        if path.name == index.FILE:  # its digest stands before it
            text = json.dumps(_changed(json.loads(path.read_bytes().partition(b"\n")[2]), draw)).encode()
            path.write_bytes(index._digest(text) + b"\n" + text)
            return
        lines = path.read_bytes().splitlines() if path.suffix == ".jsonl" else [path.read_bytes()]
        at = draw.randrange(len(lines))
        lines[at] = _encode(lines[at], _changed(json.loads(lines[at]), draw), draw)
        path.write_bytes(b"\n".join(lines))
        if path.name == STATE:
            folder = path.parent
            files = entries(file for file in folder.iterdir() if file.name != MANIFEST)
            (folder / MANIFEST).write_bytes(seal({"format": FORMAT, "files": files}))

    return damage


def _changed(value: Any, draw: random.Random) -> Any:
    """The same value but for one place in it, at any depth."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, how = draw.choice(keys), draw.random()
        if how < 0.1:
            del value[key]
        elif how < 0.15 and isinstance(value, dict):
            value[f"{key}{draw.choice(['', '_', chr(27), chr(0xD800)])}"] = draw.choice(VALUES)
        elif how < 0.2:
            deep: Any = 0
            for _ in range(draw.choice([3, 50, 900])):
                deep = {"a": deep} if draw.random() < 0.5 else [deep]
            value[key] = deep
        else:
            value[key] = _changed(value[key], draw)
        return value
    return draw.choice(VALUES)


def _encode(before: bytes, value: Any, draw: random.Random) -> bytes:
    """Encode as the file was: with the digest that it ended with, or once in ten cases with the old one or twice."""
    if isinstance(value, dict) and draw.random() < 0.9:
        if value.pop("crc32", None) is not None and is_intact(before):
            return line_of(value).encode()[:-1]
        if value.pop("blake2b", None) is not None:
            return seal(value)
        if value.pop("digest", None) is not None and before.startswith(b"{\n"):
            from fusionreid.engine.evaluation import embeddings

            body = json.dumps(value)
            digest = embeddings.blake2b(body.encode(), digest_size=32).hexdigest()
            return (json.dumps({**value, "digest": digest}, indent=2) + "\n").encode()
    text = json.dumps(value)
    twice = isinstance(value, dict) and value and draw.random() < 0.3
    return (f"{text[:-1]}, {json.dumps(next(iter(value)))}: 0}}" if twice else text).encode()
