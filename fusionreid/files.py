"""Files that are there whole or not at all, and locks that end with their owner."""

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP  # what a file system without locks answers

log = logging.getLogger(__name__)


class InUseError(OSError):
    """Another process holds a lock."""


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


def append_to(path: Path) -> TextIO:
    """Open a text file to write at its end; OSError at once for a pipe that nobody reads, which would be waited for."""
    return open(path, "a", encoding="utf-8", errors="backslashreplace", opener=_no_wait)


def _no_wait(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file at once."""
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")


def remove_drafts(path: Path) -> None:
    """Remove what killed processes left of `path`; for whoever holds the lock of that file."""
    for draft in path.parent.glob(f".{path.name}.*.partial"):
        draft.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, which stays there. The end of a process, however it comes, frees the lock.

    InUseError: without `wait`, another process holds it. OSError: the file cannot be made. On a file system without
    locks a warning says so and the block runs unprotected.
    """
    from filelock import FileLock, Timeout  # 0.1 s, which no help text needs

    lock = FileLock(path, timeout=-1 if wait else 0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise InUseError(f"{path} is held by another process") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning(
            "%s: this file system has no locks (%s): nothing keeps a second process out", path.parent, error.strerror
        )
    try:
        yield
    finally:
        lock.release()
