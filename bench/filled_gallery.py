"""A gallery of made-up vectors to search in, filled once for all cases; what filling it takes is printed."""

import atexit
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np

PIECE, IMAGES_OF_A_PERSON, QUERIES = 2**15, 50, 256


@lru_cache(1)
def filled(rows: int, width: int, dtype: str = "fp16") -> tuple[Any, np.ndarray]:
    """Fill a gallery with made-up vectors, for all cases and until the process ends, and make queries near to some."""
    from fusionreid.engine.galleries.table import Gallery

    random = np.random.default_rng(0)
    centers = random.standard_normal((max(rows // IMAGES_OF_A_PERSON, 1), width), np.float32)

    def near(count: int) -> np.ndarray:
        vectors = centers[random.integers(len(centers), size=count)]
        vectors += random.standard_normal(vectors.shape, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    folder = TemporaryDirectory()
    atexit.register(folder.cleanup)
    gallery = Gallery.create(f"{folder.name}/made", "made up", width, dtype)
    for start in range(0, rows, rows // 10):
        _fill(gallery, near, start, start + rows // 10)
    return gallery, near(QUERIES)


def _fill(gallery: Any, near: Callable[[int], np.ndarray], start: int, stop: int) -> None:
    """Add the rows from start to stop, and print what that took: most in large pieces, few as `embed` adds them.

    `embed` looks for each id, so what it takes depends on the rows that came after the last vacuum: it is timed before
    one and after it.
    """
    from fusionreid.engine.galleries.stages import commit_rows

    commit = min(commit_rows(start, gallery.width, gallery.dtype), (stop - start) // 4)
    spent = dict.fromkeys(("append", "add", "vacuum", "add again"), 0.0)

    def timed(name: str, work: Callable[..., object], *given: object) -> None:
        before = perf_counter()
        work(*given)
        spent[name] += perf_counter() - before

    appended = stop - 2 * commit - start
    for i in range(0, appended, PIECE):
        timed("append", gallery.table.add, _rows(gallery, near(min(PIECE, appended - i)), start + i))
    timed("add", gallery.add, _rows(gallery, near(commit), stop - 2 * commit))
    with catch_warnings():
        simplefilter("ignore", UserWarning)  # that all older versions go
        timed("vacuum", gallery.vacuum, 0)
    timed("add again", gallery.add, _rows(gallery, near(commit), stop - commit))
    print(f"gallery: {len(gallery):,} rows: appended at {appended / spent['append']:,.0f} rows/s; {commit:,} added at "
          f"{commit / spent['add']:,.0f} rows/s, after a vacuum of {spent['vacuum']:,.1f} s at "
          f"{commit / spent['add again']:,.0f} rows/s; {megabytes(gallery):,.0f} MB on disk, process at most "
          f"{getrusage(RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB", flush=True)  # fmt: skip


def _rows(gallery: Any, vectors: np.ndarray, first: int) -> Any:
    """Rows of made-up vectors (n, D), the ids like digests of files."""
    import pyarrow as pa

    columns: dict[str, Any] = dict.fromkeys(gallery.table.schema.names, pa.nulls(len(vectors)))
    columns["id"] = [blake2b(b"%d" % i, digest_size=16).hexdigest() for i in range(first, first + len(vectors))]
    values = pa.array(vectors.astype({"fp16": np.float16, "fp32": np.float32}[gallery.dtype]).ravel())
    columns["vector"] = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
    return pa.table(columns).cast(gallery.table.schema)


def megabytes(gallery: Any) -> float:
    """Size of a gallery's folder on disk."""
    return sum(path.stat().st_size for path in Path(f"{gallery.place}.lance").rglob("*") if path.is_file()) / 1e6
