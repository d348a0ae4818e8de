"""Files made from a gallery for other programs: Parquet, NumPy and faiss."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fusionreid.engine.galleries.find import vectors_of
from fusionreid.engine.galleries.table import SHOWN, Gallery, GalleryError, needed

SUFFIXES = ".parquet", ".npy", ".faiss"


def export(gallery: Gallery, file: Path, where: str = "") -> list[Path]:
    """Write the rows that a condition holds for, and return the files written.

    Parquet keeps all columns. `.npy` (N, D) and `.faiss`, a flat index of inner products, have vectors in fp32 only; a
    CSV file of the same name beside them has the other columns, in the same order.
    """
    if file.suffix not in SUFFIXES:
        raise GalleryError(f"{file} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if file.suffix == ".parquet":
        names = gallery.table.schema.names
        with pa.parquet.ParquetWriter(file, gallery.table.schema) as out:
            for batch in gallery.scan(names, where):
                out.write_batch(batch.select(names))
        return [file]
    about = file.with_suffix(".csv")
    vectors = _vectors(gallery, about, where)
    if file.suffix == ".faiss":
        faiss = needed("faiss", "peers")
        index = faiss.IndexFlatIP(gallery.width)
        for rows in vectors:
            index.add(rows)
        faiss.write_index(index, str(file))
        return [file, about]
    count = gallery.table.count_rows(where or None)
    out, done = np.lib.format.open_memmap(file, "w+", np.float32, (count, gallery.width)), 0
    for rows in vectors:
        out[done : done + len(rows)] = rows
        done += len(rows)
    out.flush()
    return [file, about]


def _vectors(gallery: Gallery, about: Path, where: str) -> Iterator[np.ndarray]:
    """Yield vectors (b, D) in fp32; what else is known of them goes to the file `about`."""
    columns = pa.schema([gallery.table.schema.field(name).remove_metadata() for name in SHOWN])
    with pa.csv.CSVWriter(about, columns) as out:
        for batch in gallery.scan(("vector", *SHOWN), where):
            out.write_batch(batch.select(SHOWN).cast(columns))
            yield vectors_of(batch).numpy()
