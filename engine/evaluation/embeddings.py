"""Embeddings on disk, to be ranked, compared and searched without the model.

`embeddings/` holds features.npy, fp32 (N, D) behind a memory map, and index.json: what each row shows and where it is
from. Both are written aside and renamed when whole; reading them runs no code.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusionreid.dataloading.records import Record, printable
from fusionreid.engine.command import OutputFolderError
from fusionreid.engine.storage import StorageError
from fusionreid.errors import ReIDError
from fusionreid.files import write_json

FORMAT = 1
FEATURES, INDEX = "features.npy", "index.json"


class EmbeddingsError(ReIDError, ValueError):
    """A folder that holds no embeddings, or not those that are needed."""

    exit_code = 3


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Rows in the order of the records; a person or camera of -1 is not known."""

    features: Tensor  # (N, D) fp32, behind a private memory map: what is written to it never reaches the file
    records: tuple[Record, ...]
    num_query: int  # the first rows; the others are the gallery
    source: Mapping[str, Any]  # checkpoint, data set and settings


def check_place(folder: Path) -> None:
    """OutputFolderError unless `finish` may put its folder there: it replaces embeddings, and nothing else."""
    try:
        others = {path.name for path in folder.iterdir()} - {FEATURES, INDEX} if folder.exists() else ()
        if not others:
            return
        what = "exists and holds more than embeddings"
    except OSError as error:
        what = f"cannot become a folder of embeddings ({error.strerror})"
    raise OutputFolderError(f"{printable(folder)} {what}, and would be replaced: name a folder that is not there yet")


def draft(folder: Path, count: int, width: int, *, create: bool) -> Tensor:
    """A shared map (N, D) of the file to be, for all processes to write their rows to; the first one creates it."""
    path = _aside(folder) / FEATURES
    try:
        if create:
            shutil.rmtree(path.parent, ignore_errors=True)
            path.parent.mkdir(parents=True)
        mode = "w+" if create else "r+"
        array = np.lib.format.open_memmap(path, mode=mode, dtype=np.float32, shape=(count, width))
        if create:  # a hole in the file would end the process when the disk is full
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise StorageError(f"{printable(path)} cannot be written: {error}; make room or set another folder") from error
    return torch.from_numpy(array)


def finish(
    folder: Path, features: Tensor, records: Sequence[Record], num_query: int, source: Mapping[str, Any]
) -> None:
    """The draft, whole, takes its place."""
    aside, old = _aside(folder), folder.with_name(f".{folder.name}.old")
    index = {
        "format": FORMAT, "rows": len(features), "width": features.shape[1], "queries": num_query, "source": source,
        "persons": [record.person for record in records], "cameras": [record.camera for record in records],
        "paths": [printable(record.path) for record in records],
    }  # fmt: skip
    try:
        with open(aside / FEATURES, "rb+") as file:
            os.fsync(file.fileno())
        write_json(aside / INDEX, index)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"{printable(folder)} cannot be written: {error}; make room or set another folder"
        ) from error


def load(folder: Path) -> Embeddings:
    """EmbeddingsError says what is wrong with a folder that is not one of `finish`."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        if index["format"] != FORMAT:
            raise EmbeddingsError(f"{folder} has embeddings of format {index['format']}, this is {FORMAT}: embed again")
        array = np.load(folder / FEATURES, mmap_mode="c", allow_pickle=False)
        records = tuple(map(Record, index["paths"], index["persons"], index["cameras"]))
        if array.dtype != np.float32 or array.shape != (index["rows"], index["width"]) or len(records) != len(array):
            raise ValueError(f"{FEATURES} is {array.dtype} {array.shape}, {INDEX} speaks of {len(records)} rows")
        numbers, texts = (index["queries"], *index["persons"], *index["cameras"]), index["paths"]
        if {*map(type, numbers)} != {int} or {*map(type, texts)} != {str} or type(index["source"]) is not dict:
            raise ValueError(f"{INDEX} has an entry of a wrong type")
        if not 0 <= index["queries"] <= len(records):
            raise ValueError(f"{INDEX} speaks of {index['queries']} queries in {len(records)} rows")
        return Embeddings(torch.from_numpy(array), records, index["queries"], index["source"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, EmbeddingsError):
            raise
        raise EmbeddingsError(f"{folder} holds no whole embeddings ({error}): embed again, or name another") from error


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")
