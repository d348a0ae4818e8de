"""OUTPUT_DIR: one command at a time writes to it, and a disk that does not take what is to be kept is told apart."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fusionreid.errors import ReIDError, StorageError
from fusionreid.files import InUseError, locked

__all__ = ["FULL", "OutputFolderError", "StorageError", "lock"]

FULL = errno.ENOSPC, errno.EDQUOT
LOCK = ".lock"


class OutputFolderError(ReIDError, RuntimeError):
    """The output folder cannot be used: another run has it, or it cannot be written."""


def lock(output_dir: Path) -> ExitStack:
    """Make and take the output folder until the result is closed or this process ends, however it ends."""
    with ExitStack() as stack:
        stack.enter_context(_held(output_dir))
        return stack.pop_all()


@contextmanager
def _held(output_dir: Path) -> Iterator[None]:
    with ExitStack() as stack:
        path = output_dir / LOCK
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            if not os.access(output_dir, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            stack.enter_context(locked(path, wait=False))
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        except InUseError as error:
            owner = path.read_text(encoding="utf-8", errors="replace") or "another process"
            message = f"OUTPUT_DIR {output_dir} is in use by {owner}: wait for it or set another OUTPUT_DIR"
            raise OutputFolderError(message) from error
        except OSError as error:
            if error.errno in FULL:
                message = f"OUTPUT_DIR {output_dir} cannot be written: {error}; make room or set another OUTPUT_DIR"
                raise StorageError(message) from error
            raise OutputFolderError(f"OUTPUT_DIR {output_dir} cannot be written: {error}; set another one") from error
        yield
