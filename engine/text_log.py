"""Python's logging, set up once per command: time, level and rank on stderr and in OUTPUT_DIR/log.txt.

The file is the main rank's. It also has what the command prints on stdout, a line each.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from fusionreid.files import append_to

FILE = "log.txt"
RANK, RANKS = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
WHO = f" [rank {RANK}]" if RANKS != "1" else ""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but tab and line ends


def visible(text: str) -> str:
    """Show control characters as escapes: a file's name must not move the cursor, nor turn the text around."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class Formatter(logging.Formatter):
    """A line with time, level and rank that no terminal takes for a command."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return visible(super().format(record))


FORMAT = Formatter(f"%(asctime)s %(levelname)s{WHO} %(message)s", "%Y-%m-%d %H:%M:%S")


class FolderHandler(logging.Handler):
    """Appends to log.txt in a folder, and keeps what comes before the folder is there.

    A log that cannot be written must not stop a run: what the disk does not take is dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(FORMAT)
        self.folder: Path | None = None
        self._early: list[str] = []
        self._file: TextIO | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record to the file, or keep it until the folder is there."""
        self._early.append(f"{self.format(record)}\n")
        self.flush()

    def flush(self) -> None:
        """Write what was kept, once the folder is there."""
        with suppress(OSError, ValueError):
            if self._file is None and self.folder is not None and self.folder.is_dir():
                self._file = append_to(self.folder / FILE)
            if self._file is not None:
                lines, self._early = "".join(self._early), []
                self._file.write(lines)
                self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self.flush()
        if self._file is not None:
            with suppress(OSError, ValueError):
                self._file.close()
        super().close()


@contextmanager
def logging_to(stderr: Any) -> Iterator[FolderHandler]:
    """Send log records to stderr and, once its `folder` is set, to the handler that comes back; undone at the end."""
    terminal, file = logging.StreamHandler(stderr), FolderHandler()
    terminal.setFormatter(FORMAT)
    root, ours = logging.getLogger(), logging.getLogger("fusionreid")
    handlers: list[logging.Handler] = [*([terminal] if stderr else []), *([file] if RANK == "0" else [])]
    before = ours.level
    for handler in handlers:
        root.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield file
    finally:
        ours.setLevel(before)
        for handler in handlers:
            root.removeHandler(handler)
        terminal.close()
        file.close()
