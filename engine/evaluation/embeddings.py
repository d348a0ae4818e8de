"""Embeddings on disk, to be ranked, compared and searched without the model.

A folder holds features-<i>-of-<n>.npy, the rows (n_i, D) in fp32 of process i, for each i, and index.json: what each
row shows, where it is from, and the digest of every file. The folder is written beside its place and renamed when
whole. Reading it verifies every byte and runs no code.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from pydantic_core import from_json
from torch import Tensor

from fusionreid.dataloading.image_files import open_file, read_file
from fusionreid.dataloading.records import Record, printable
from fusionreid.engine.evaluation.finite import ROWS_AT_ONCE
from fusionreid.engine.storage import OutputFolderError, StorageError
from fusionreid.errors import ReIDError
from fusionreid.files import atomic_write

FORMAT = 2
INDEX = "index.json"
PIECE = 2**24  # bytes read at once
OWN_FILES = re.compile(r"index\.json|features(-\d{5}-of-\d{5})?\.npy")  # the short name is that of format 1


class EmbeddingsError(ReIDError, ValueError):
    """A folder holds no embeddings, damaged ones, or not those that are needed."""

    exit_code = 3


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Rows in the order of the records; a person or camera of -1 is not known."""

    features: Tensor  # (N, D) fp32, on the CPU
    records: tuple[Record, ...]
    num_query: int  # the first rows; the others are the gallery
    source: Mapping[str, Any]  # checkpoint, data set and settings


class FeatureFile(BaseModel, strict=True, frozen=True, extra="forbid"):
    """One file of consecutive rows, as the index names it."""

    name: Annotated[str, Field(pattern=r"^features-\d{5}-of-\d{5}\.npy$")]
    rows: NonNegativeInt
    digest: str  # BLAKE2b of the whole file


class Index(BaseModel, strict=True, frozen=True, extra="forbid"):
    """The content of index.json but for its own digest; N rows, as many as persons, cameras and paths."""

    format: int = FORMAT
    width: PositiveInt
    queries: NonNegativeInt
    files: list[FeatureFile]  # in the order of their rows
    source: dict[str, Any]
    persons: list[int]
    cameras: list[int]
    paths: list[str]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        counts = {len(self.persons), len(self.cameras), len(self.paths), sum(file.rows for file in self.files)}
        if len(counts) > 1 or self.queries > len(self.paths):
            raise ValueError("its numbers of rows do not agree")
        if not all(isinstance(self.source.get(key, ""), str) for key in ("data", "checkpoint")):
            raise ValueError("its source names no data set or no checkpoint")
        return self


def check_place(folder: Path) -> None:
    """Raise OutputFolderError unless embeddings may be put there: they replace earlier ones, and nothing else."""
    try:
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        if all(OWN_FILES.fullmatch(name) for name in names):
            return
        what = "exists and holds more than embeddings"
    except OSError as error:
        what = f"cannot become a folder of embeddings ({error.strerror})"
    raise OutputFolderError(f"{printable(folder)} {what}, and would be replaced: name a folder that is not there yet")


def begin(folder: Path) -> None:
    """Make an empty draft of the folder, for all processes to write their files to."""
    with _disk(folder):
        shutil.rmtree(_draft(folder), ignore_errors=True)
        _draft(folder).mkdir(parents=True)


def is_begun(folder: Path) -> bool:
    """Whether this process sees the draft."""
    return _draft(folder).is_dir()


def not_shared(folder: Path, sign: str) -> OutputFolderError:
    """The error of hosts that do not see each other's files."""
    return OutputFolderError(f"{printable(folder)} must be on a disk that all hosts share, and is not: {sign}")


def write_rows(
    folder: Path, batches: Iterable[Tensor], shape: tuple[int, int], share: tuple[int, int] = (0, 1)
) -> FeatureFile:
    """Write the rows of share (i, n) to the draft: `batches` (b, D) on the CPU, together of the shape (n_i, D)."""
    path, digest = _draft(folder) / f"features-{share[0]:05}-of-{share[1]:05}.npy", blake2b(digest_size=32)
    header = BytesIO()
    layout = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(header, layout)
    with _disk(folder), atomic_write(path) as file:
        for piece in chain([memoryview(header.getvalue())], map(_bytes, batches)):
            file.write(piece)
            digest.update(piece)
    return FeatureFile(name=path.name, rows=shape[0], digest=digest.hexdigest())


def finish(folder: Path, index: Index) -> None:
    """Write the index and put the whole draft in its place."""
    draft, old = _draft(folder), folder.with_name(f".{folder.name}.old")
    with _disk(folder):
        if missing := [file.name for file in index.files if not (draft / file.name).is_file()]:
            raise not_shared(folder, f"the first process does not see {', '.join(missing[:3])}")
        with atomic_write(draft / INDEX) as file:
            file.write(_rendered(index))
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(draft, folder)
        shutil.rmtree(old, ignore_errors=True)


def index_of(
    files: Iterable[FeatureFile], width: int, records: Sequence[Record], num_query: int, source: Mapping[str, Any]
) -> Index:
    """The index of files of D-wide rows, one row per record."""
    return Index(
        width=width,
        queries=num_query,
        files=list(files),
        source=dict(source),
        persons=[record.person for record in records],
        cameras=[record.camera for record in records],
        paths=[printable(record.path) for record in records],
    )


def save(folder: Path, features: Tensor, records: Sequence[Record], num_query: int, source: Mapping[str, Any]) -> None:
    """Write features (N, D) of one process, on any device, as a folder of embeddings."""
    begin(folder)
    file = write_rows(folder, (rows.cpu() for rows in features.split(ROWS_AT_ONCE)), (len(features), features.shape[1]))
    finish(folder, index_of([file], features.shape[1], records, num_query, source))


def folder_at(path: Path) -> Path:
    """The folder of embeddings that a path means: itself, or `embeddings` in the folder of a run."""
    inner = path / "embeddings"
    return inner if (inner / INDEX).is_file() and not (path / INDEX).is_file() else path


def load(folder: Path) -> Embeddings:
    """Read a folder that `finish` has put there; EmbeddingsError says what is wrong with any other."""
    try:
        index = _read_index(folder)
        sizes = [(folder / file.name, 4 * file.rows * index.width) for file in index.files]
        if short := [path.name for path, size in sizes if path.stat().st_size < size]:  # before memory is taken
            raise ValueError(f"{short[0]} is cut short")
        features = torch.empty(len(index.paths), index.width)
        for file, rows in zip(index.files, features.split([file.rows for file in index.files])):
            _read_rows(folder / file.name, rows, file.digest)
        records = tuple(map(Record, index.paths, index.persons, index.cameras))
        return Embeddings(features, records, index.queries, index.source)
    except (OSError, ValueError) as error:
        if isinstance(error, EmbeddingsError):
            raise
        raise EmbeddingsError(f"{folder} holds no whole embeddings ({error}): embed again, or name another") from error


def _read_index(folder: Path) -> Index:
    """The index, verified to be the very bytes that were written."""
    text = read_file(str(folder / INDEX))
    content = from_json(text)
    if not isinstance(content, dict):
        raise ValueError(f"{INDEX} is not a JSON object")
    if content.get("format") != FORMAT:
        made = content.get("format")
        raise EmbeddingsError(f"{folder} has embeddings of format {made!r}, this is {FORMAT}: embed again")
    content.pop("digest", None)
    try:
        index = Index.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{INDEX}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if _rendered(index) != text:
        raise ValueError(f"{INDEX} is not as it was written")
    return index


def _read_rows(path: Path, rows: Tensor, expected: str) -> None:
    """Fill rows (n, D) with the file's and verify its digest; nothing is mapped, so a file that shrinks is an error."""
    data, digest = _bytes(rows), blake2b(digest_size=32)
    with open_file(str(path)) as file:
        digest.update(file.read(max(os.fstat(file.fileno()).st_size - len(data), 0)))  # the header
        for start in range(0, len(data), PIECE):
            piece = file.read(min(PIECE, len(data) - start))
            digest.update(piece)
            data[start : start + PIECE] = piece  # ValueError if it is shorter
    if digest.hexdigest() != expected:
        raise ValueError(f"{path.name} is not as it was written")


def _bytes(rows: Tensor) -> memoryview:
    """The memory of contiguous fp32 rows on the CPU."""
    return memoryview(rows.contiguous().numpy()).cast("B") if rows.numel() else memoryview(b"")


def _rendered(index: Index) -> bytes:
    """The text of index.json, with a digest of all else as its last entry."""
    content = index.model_dump(mode="json")
    digest = blake2b(json.dumps(content).encode(), digest_size=32).hexdigest()
    return (json.dumps({**content, "digest": digest}, indent=2) + "\n").encode()


def _draft(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Turn what the disk says into a StorageError that names the folder."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{printable(folder)} cannot be written: {error}; make room or set another folder"
        ) from error
