"""The stages from a list of images to rows of a gallery, each from Arrow table to Arrow table.

`read` takes paths and finds what is new, `Embed` makes vectors of it, `write` commits them. They run in this process,
or on many machines by Ray Data, which may repeat any of them: an image that is there is not added.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from fusionreid.dataloading.decode import pixels_in
from fusionreid.dataloading.image_files import open_file
from fusionreid.dataloading.records import DataError, printable
from fusionreid.engine.config import Config
from fusionreid.engine.embedder import Embedder
from fusionreid.engine.galleries.table import TEXTS, Gallery, GalleryError

READ_ROWS = 256  # images decoded, and embedded, together
COMMIT_ROWS = 4096  # that one version adds, at least
COMMIT_BYTES = 2**26  # of vectors that it adds at most, if these are more rows
TIME = pa.timestamp("us", "UTC")
DECODED = pa.schema([
    ("id", pa.string()), *((name, pa.string()) for name in TEXTS), ("time", TIME),
    ("state", pa.string()),  # null: new; KNOWN, or why it cannot be used
    ("pixels", pa.large_binary()), ("height", pa.int32()), ("width", pa.int32()),
])  # fmt: skip
KNOWN = "known"
SHARD = pa.schema([
    ("path", pa.binary()), ("image", pa.large_binary()), ("fault", pa.string()),
    *((name, pa.string()) for name in TEXTS if name != "path"), ("time", TIME),
])  # fmt: skip
DONE = pa.schema([("added", pa.int64()), ("known", pa.int64()), ("faults", pa.list_(pa.string()))])


def read(images: pa.Table, place: str, given: Mapping[str, str], root: str = "") -> pa.Table:
    """Digest and decode those images that the gallery does not have.

    Columns: path, as text or bytes, or image with the bytes of a file, and, if known, person, camera, track and time;
    `given` are the values of those that a list does not have. Paths are relative to `root`.
    """
    columns = images.column_names
    if not {"path", "image"} & set(columns):
        raise DataError(f"a list of images needs the column path, or image with their bytes, it has {columns}")
    with ThreadPoolExecutor() as threads:
        given_paths = images["path"].to_pylist() if "path" in columns else [None] * len(images)
        paths = [path and _full(root, os.fsdecode(path)) for path in given_paths]
        contents = images["image"].to_pylist() if "image" in columns else [*threads.map(_content, paths)]
        if images.schema == SHARD:
            contents = [why or data for why, data in zip(images["fault"].to_pylist(), contents)]
        ids = [blake2b(data, digest_size=16).hexdigest() if isinstance(data, bytes) else "" for data in contents]
        known = Gallery.open(place).known([*filter(None, ids)])
        pixels = [*threads.map(lambda data, id: None if id in known else _pixels(data), contents, ids)]
    rows: dict[str, Any] = {"id": ids, "path": [path and printable(path) for path in paths]}
    rows |= {name: _texts(images, name, given) for name in TEXTS if name != "path"}
    rows["time"] = images["time"].cast(TIME) if "time" in columns else [_modified(path) for path in paths]
    rows["state"] = [KNOWN if id in known else p if isinstance(p, str) else None for id, p in zip(ids, pixels)]
    arrays = [p if isinstance(p, np.ndarray) else None for p in pixels]
    rows["pixels"] = [None if p is None else p.tobytes() for p in arrays]
    rows |= {name: [None if p is None else p.shape[i] for p in arrays] for i, name in enumerate(("height", "width"))}
    return pa.table(rows, schema=DECODED)


class Embed:
    """Replaces pixels by vectors; one per process, or per GPU, since it holds the model."""

    def __init__(self, cfg: Config, model: str, dtype: str) -> None:
        self.embedder, self.dtype = Embedder(cfg), np.dtype("float16" if dtype == "fp16" else "float32")
        if self.embedder.model_digest != model:
            raise GalleryError(f"the model is {self.embedder.model_digest} here, {model} where the run began: the "
                               "checkpoint has changed meanwhile; begin again")  # fmt: skip

    def __call__(self, images: pa.Table) -> pa.Table:
        """Embed the new images of a table that `read` has made."""
        new = pc.is_null(images["state"]).to_numpy()
        rows = images.filter(pa.array(new)).select(["pixels", "height", "width", "camera"]).to_pylist()
        vectors = np.zeros((len(images), self.embedder.dimension), self.dtype)
        if rows:
            arrays = [np.frombuffer(r["pixels"], np.uint8).reshape(r["height"], r["width"], 3) for r in rows]
            cameras = [r["camera"] if r["camera"] in self.embedder.cameras else None for r in rows]
            vectors[new] = self.embedder(arrays, cameras)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1], mask=pa.array(~new))
        return images.drop_columns(["pixels", "height", "width"]).append_column("vector", column)


def commit_rows(rows: int, width: int, dtype: str) -> int:
    """Rows of one commit to a gallery: a hundredth of its own, since their ids are compared, within the limits."""
    return max(COMMIT_ROWS, min(rows // 100, COMMIT_BYTES // (width * (2 if dtype == "fp16" else 4))))


def write(rows: pa.Table, place: str) -> pa.Table:
    """Commit the new rows, and return what became of all, as one row of DONE."""
    gallery, state = Gallery.open(place), rows["state"]
    new = rows.filter(pc.is_null(state)).select(gallery.table.schema.names)
    first = {id: row for row, id in reversed(list(enumerate(new["id"].to_pylist())))}  # of two images that are equal
    added = gallery.add(new.take(pa.array(sorted(first.values()), pa.int64())))
    faulty = rows.filter(pc.not_equal(state, KNOWN).fill_null(False))
    faults = [f"{path or 'an image without a path'}: {why}" for path, why in zip(*(
        faulty[name].to_pylist() for name in ("path", "state")))]  # fmt: skip
    return pa.table([[added], [len(rows) - added - len(faults)], [faults]], schema=DONE)


def _full(root: str, path: str) -> str:
    return path if "://" in path else os.path.join(root, path)


def _content(path: str | None) -> bytes | str:
    """The bytes of a file, here or in a bucket, or why there are none."""
    if path is None:
        return "it has no path"
    try:
        with open_place(path) as file:
            return file.read()
    except OSError as error:
        return error.strerror or str(error)


def open_place(path: str) -> AbstractContextManager[Any]:
    """Open a regular file, here or in a bucket, to be read once from its beginning."""
    if "://" not in path:
        return open_file(path)
    scheme, rest = path.split("://", 1)
    bucket, _, key = rest.partition("/")
    files, base = _bucket(f"{scheme}://{bucket or '/'}")  # file:///
    return files.open_input_stream(f"{base}/{key}")


@lru_cache(16)
def _bucket(uri: str) -> tuple[fs.FileSystem, str]:
    return fs.FileSystem.from_uri(uri)


def _pixels(content: bytes | str | None) -> np.ndarray | str:
    """Decode a file (h, w, 3), or say why it cannot be."""
    if not isinstance(content, bytes):
        return content or "empty"
    try:
        return pixels_in(content).numpy()
    except Exception as error:  # decoders raise whatever a broken file leads them to
        return str(error)


def _texts(images: pa.Table, name: str, given: Mapping[str, str]) -> Sequence[str | None]:
    if name not in images.column_names:
        return [given.get(name)] * len(images)
    return [text or given.get(name) for text in images[name].cast(pa.string()).to_pylist()]


def _modified(path: str | None) -> datetime | None:
    """When a file here was last written, in a list without times."""
    if path is None or "://" in path or not os.path.exists(path):
        return None
    return datetime.fromtimestamp(os.path.getmtime(path), UTC)
