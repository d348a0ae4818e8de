"""Files that are there whole or not at all, and the error of a disk that does not take them."""

import json
import os
from pathlib import Path
from typing import Any


class StorageError(OSError):
    """The disk did not take what was to be kept; what was there before is untouched."""

    exit_code = 4


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file at once: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
