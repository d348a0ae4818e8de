"""Files that are there whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: Path, mode: str = "wb", encoding: str | None = None) -> Iterator[IO[Any]]:
    """Open a draft beside `path` that takes its place, synced, at the end of the block; a reader sees old or new.

    If the block raises, the draft is removed and `path` is as it was. A process that is killed leaves the draft, a
    hidden file that ends in `.partial`. OSError: the disk does not take it.
    """
    # A name of its own: where a file system locks on each host alone, two processes could write to one draft.
    draft = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        with open(draft, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file at once."""
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")


def remove_drafts(path: Path) -> None:
    """Remove what killed processes left of `path`; for whoever holds the lock of that file."""
    for draft in path.parent.glob(f".{path.name}.*.partial"):
        draft.unlink(missing_ok=True)
