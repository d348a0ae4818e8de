"""Digests: JSON that ends with a digest of itself, and digests of whole files. Importing this does not import torch."""

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fusionreid.files import atomic_write

MAX_BYTES = 16 * 2**20  # of a sealed file: one that is larger is none of ours


def seal(values: Mapping[str, Any]) -> bytes:
    """Encode as JSON that ends with a digest of itself, so that no byte is without one."""
    body = json.dumps(values, indent=2)
    digest = hashlib.blake2b(body.encode(), digest_size=32).hexdigest()
    return f'{body[:-2]},\n  "blake2b": "{digest}"\n}}\n'.encode()


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a file by what `seal` encodes, at once."""
    with atomic_write(path) as file:
        file.write(seal(values))


def unseal(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Read what `seal` encoded, as `unsealed` does; OSError if the file cannot be read."""
    check_file(path)
    with open(path, "rb") as file:
        return unsealed(file.read(MAX_BYTES + 1), required=required)


def unsealed(raw: bytes, *, required: bool = True) -> dict[str, Any]:
    """Decode what `seal` encoded; ValueError if any byte differs. Unless `required`, JSON without a digest passes."""
    try:
        values = json.loads(raw)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        digest = values.pop("blake2b", None)
        if (digest is not None or required) and seal(values) != raw:
            raise ValueError("its digest is not that of its content")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return values


def entries(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and digest of files, by name."""
    ordered = sorted(paths)
    with ThreadPoolExecutor() as pool:
        return dict(zip((path.name for path in ordered), pool.map(entry, ordered)))


def entry(path: Path) -> dict[str, Any]:
    """Size and digest of a file."""
    check_file(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
        return {"bytes": file.tell(), "blake2b": digest}


def check_file(path: Path) -> None:
    """Raise FileNotFoundError unless the path is a plain file: a pipe would be waited for."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "not a file" if path.exists() else "no such file", str(path))
