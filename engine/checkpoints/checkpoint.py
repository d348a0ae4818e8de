"""Checkpoints: folders of safetensors and JSON, renamed when whole and never believed without their digests.

`step-00000123/` holds <part>.safetensors (model, optimizer, ...), state.json, and manifest.json with a digest of each.
Reading one runs no code, so a checkpoint may come from anyone.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusionreid.engine.storage import StorageError
from fusionreid.errors import ReIDError
from fusionreid.files import write_json

FORMAT = 1
MANIFEST, STATE, BEST, TENSORS = "manifest.json", "state.json", "best.json", ".safetensors"
TABLE_ROWS = 20  # of a comparison; the rest is counted

log = logging.getLogger(__name__)


class CheckpointError(ReIDError, RuntimeError):
    """A checkpoint that does not fit, is of another format, or is damaged."""

    exit_code = 3


class DamagedError(CheckpointError):
    """Bytes are missing or are not those that were written."""


def save(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write `root/step-<step>` whole or not at all; a checkpoint of the same step is replaced.

    Each part of `tensors` becomes a file. Step, format and versions are added to `state`, which must fit into JSON.
    """
    final, temporary = root / f"step-{step:08d}", root / f".tmp-step-{step:08d}"
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    text = json.dumps({**state, "format": FORMAT, "step": step, "versions": versions}, indent=2)
    needed = sum(t.nbytes for part in tensors.values() for t in part.values()) + len(text)
    with _storing(final, needed):
        root.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(root).free < 1.2 * needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            for name, part in tensors.items():  # a copy of each tensor: two names may share memory, which is refused
                plain = {key: t.detach().clone(memory_format=torch.contiguous_format) for key, t in part.items()}
                save_file(plain, temporary / f"{name}{TENSORS}", metadata={"format": "pt"})
            (temporary / STATE).write_text(text, encoding="utf-8")
            (temporary / MANIFEST).write_bytes(_manifest(FORMAT, _entries(temporary.iterdir())))
            for path in (*temporary.iterdir(), temporary):
                _sync(path)
            if final.exists():
                _discard(final)
            os.rename(temporary, final)
            _sync(root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def verify(path: Path) -> list[str]:
    """The files of a checkpoint; CheckpointError unless each has the size and digest that the manifest gives."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}")
    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        version, files = manifest["format"], manifest["files"]
        if raw != _manifest(version, files):
            raise DamagedError(f"{path / MANIFEST} is damaged: use another checkpoint")
        if version != FORMAT:
            raise CheckpointError(
                f"{path} has checkpoint format {version}, this is {FORMAT}: use the version it is from"
            )
        found = _entries(path / name for name in files)  # by file name: one with a folder in it is not found
        for name in files:
            if found[name] != files[name]:
                raise DamagedError(f"{path / name} is damaged: use another checkpoint")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path / MANIFEST} cannot be followed ({error}): use another checkpoint") from error
    return list(files)


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by part, state) of a verified checkpoint; the tensors are in memory of their own."""
    names = verify(path)
    try:
        state = json.loads((path / STATE).read_bytes())
        parts = [name.removesuffix(TENSORS) for name in names if name.endswith(TENSORS)]
        files = {part: load_file(path / f"{part}{TENSORS}") for part in parts}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no checkpoint although its digests match: {error}") from error
    return {part: {key: tensor.clone() for key, tensor in tensors.items()} for part, tensors in files.items()}, state


def checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders, whole or damaged, by step number: the clock plays no part."""
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-[0-9]{8,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest(root: Path) -> Path | None:
    """The whole checkpoint with the highest step, or None if there is none at all; damaged ones are passed over."""
    candidates = checkpoints(root)
    for path in reversed(candidates):
        try:
            verify(path)
            return path
        except DamagedError as error:
            log.warning("checkpoint passed over: %s", error)
    if candidates:
        raise CheckpointError(f"every checkpoint in {root} is damaged: remove the folder to start from the beginning")
    return None


class Best(NamedTuple):
    """The checkpoint to keep whatever comes, and how good it is."""

    path: Path
    score: float


def mark_best(root: Path, step: int, score: float) -> None:
    """`purge` spares this step from now on, and no longer the one marked before."""
    with _storing(root / BEST):
        write_json(root / BEST, {"step": step, "score": score})


def best(root: Path) -> Best | None:
    """The checkpoint that was marked as best, if one was; it may be damaged."""
    try:
        mark = json.loads((root / BEST).read_bytes())
        return Best(root / f"step-{mark['step']:08d}", float(mark["score"]))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{root / BEST} is damaged ({error}): remove it") from error


def purge(root: Path, keep: int = 2) -> None:
    """Remove all checkpoints but the last `keep` and the best."""
    spared = best(root)
    with _storing(root):
        for path in checkpoints(root)[:-keep]:
            if spared is None or path != spared.path:
                _discard(path)


def clean(root: Path) -> None:
    """Remove what a killed run left half done. For the holder of the run's lock only."""
    for leftover in root.glob(".tmp-*"):
        log.warning("removed %s, left half done by an earlier run", leftover)
        shutil.rmtree(leftover, ignore_errors=True)


def compare(what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """CheckpointError with a table of the entries that differ; of tensors, type and shape are compared."""
    keys = [*ours, *(key for key in theirs if key not in ours)]
    pairs = [(key, _text(ours, key), _text(theirs, key)) for key in keys]
    rows = [("entry", "this run", "checkpoint"), *(pair for pair in pairs if pair[1] != pair[2])]
    if len(rows) > 1:
        shown = rows[: TABLE_ROWS + 1]
        widths = [max(len(row[column]) for row in shown) for column in range(3)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in shown]
        table += [f"and {len(rows) - len(shown)} more"] if len(rows) > len(shown) else []
        raise CheckpointError(
            f"{what} of the checkpoint does not fit this run:\n  " + "\n  ".join(table) + "\n"
            "use the configuration of the checkpoint, or another OUTPUT_DIR"
        )


def _text(entries: Mapping[str, Any], key: str) -> str:
    value = entries.get(key, "absent")
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor) else str(value)


def _entries(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and digest of files, by name."""
    ordered = sorted(paths)
    with ThreadPoolExecutor() as pool:
        return dict(zip((path.name for path in ordered), pool.map(_entry, ordered)))


def _entry(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(errno.ENOENT, "not a file", str(path))
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
        return {"bytes": file.tell(), "blake2b": digest}


def _manifest(version: int, files: Mapping[str, Any]) -> bytes:
    """The manifest ends with a digest of itself, so that no byte of a checkpoint is without one."""
    body = json.dumps({"format": version, "files": files}, indent=2)
    digest = hashlib.blake2b(body.encode(), digest_size=32).hexdigest()
    return f'{body[:-2]},\n  "blake2b": "{digest}"\n}}\n'.encode()


@contextmanager
def _storing(path: Path, needed: int = 0) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        try:
            free = f"{shutil.disk_usage(path.parent).free / 2**20:.1f} MiB"
        except OSError:
            free = "an unknown amount"
        raise StorageError(
            f"{path} was not written: {error}; {needed / 2**20:.1f} MiB needed, {free} free: make room or set another "
            f"OUTPUT_DIR"
        ) from error


def _discard(path: Path) -> None:
    """Remove a checkpoint so that a kill in between leaves no half of it under its name."""
    doomed = path.with_name(f".tmp-old-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk and not only into its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
