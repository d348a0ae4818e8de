"""Searching a gallery: exactly, by reading its vectors once, or by an index of LanceDB, which may miss some."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from lancedb.index import HnswSq, IvfPq
from torch import Tensor

from fusionreid.engine.galleries.table import SHOWN, Gallery, GalleryError, reported
from fusionreid.kernels import nearest_neighbours
from fusionreid.kernels.neighbours import may_be_nearer

BYTES = 2**24  # of vectors in fp32 compared at once, while the next are read
FEWEST_AT_ONCE = 1024
INDEXES = {"ivf_pq": IvfPq, "hnsw": HnswSq}
ITERATIONS = 10  # of k-means; LanceDB's 50 take four times as long and found no more in 50,000 rows
FEWEST_ROWS = 256  # that an index learns from
REFINED = 10  # times as many candidates of an index get their exact distance
SAMPLE = 100  # rows that recall is measured with


class Found(NamedTuple):
    """The rows nearest to each of Q queries, the nearest first; there may be fewer than asked for."""

    cosines: np.ndarray  # (Q, k); NaN past the last row found
    positions: np.ndarray  # (Q, k) in rows
    rows: pa.Table  # id, person, camera, time, track and path


def exact(gallery: Gallery, queries: np.ndarray, count: int, where: str = "") -> Found:
    """Find the `count` rows nearest to each query (Q, D) by the fp64 distance, in one pass that holds few vectors."""
    asked = torch.from_numpy(_fitting(gallery, queries)).to("cuda" if torch.cuda.is_available() else "cpu")
    distances = torch.empty(len(asked), 0, dtype=torch.float64, device=asked.device)
    positions, rows = torch.empty(len(asked), 0, dtype=torch.int64), pa.schema([]).empty_table()
    for batch in gallery.scan(("vector", *SHOWN), where, max(FEWEST_AT_ONCE, BYTES // (4 * gallery.width))):
        vectors = stored_vectors(batch).to(asked.device)
        if distances.shape[1] == count:
            few = may_be_nearer(asked, vectors, distances[:, -1])
            if not len(few):
                continue
            vectors, batch = vectors[few], batch.take(pa.array(few.cpu().numpy()))
        near = nearest_neighbours(asked, vectors.float(), min(count, len(batch)), normalize=True)
        distances, order = torch.cat([distances, near.distances], 1).sort(dim=1, stable=True)
        both = torch.cat([positions, near.indices.cpu() + len(rows)], 1).gather(1, order.cpu())[:, :count]
        distances, shown = distances[:, :count], pa.Table.from_batches([batch.select(SHOWN)])
        used, inverse = both.unique(return_inverse=True)
        rows = pa.concat_tables([rows, shown] if len(rows) else [shown]).take(pa.array(used.numpy()))
        positions = inverse
    return Found(1 - distances.cpu().numpy() / 2, positions.numpy(), rows)


def indexed(gallery: Gallery, queries: np.ndarray, count: int, where: str = "") -> Found:
    """Find about the `count` rows nearest to each query (Q, D) by the index; their cosines are exact."""
    if not any(index.columns == ["vector"] for index in gallery.table.list_indices()):
        raise GalleryError(f"{gallery.place} has no index: fusionreid gallery index {gallery.place} makes one; without "
                           "--index the search is exact")  # fmt: skip
    found = []
    for query in _fitting(gallery, queries):
        search = gallery.table.search(query).distance_type("cosine").refine_factor(REFINED).limit(count)
        found.append((search.where(where) if where else search).select([*SHOWN, "_distance"]).to_arrow())
    cosines = np.full((len(found), max(map(len, found))), np.nan)  # filters may leave one query fewer than another
    positions = np.zeros(cosines.shape, np.int64)
    for row, (table, start) in enumerate(zip(found, np.cumsum([0, *map(len, found)]))):
        cosines[row, : len(table)] = 1 - table["_distance"].to_numpy()
        positions[row, : len(table)] = np.arange(start, start + len(table))
    return Found(cosines, positions, pa.concat_tables(found).select(SHOWN))


def build_index(gallery: Gallery, kind: str = "ivf_pq") -> float:
    """Build an index, or build it anew, and return its recall@10: the share that it finds of the ten nearest rows."""
    if (count := len(gallery)) < FEWEST_ROWS:
        raise GalleryError(f"{gallery.place} has {count} rows, an index needs {FEWEST_ROWS}: search without it")
    with reported(gallery.place):
        gallery.table.create_index(
            "vector", config=INDEXES[kind](distance_type="cosine", max_iterations=ITERATIONS), replace=True
        )
    sample = np.random.default_rng(0).choice(count, min(SAMPLE, count), replace=False)
    queries = vectors_of(gallery.table.take_offsets(sorted(sample.tolist())).select(["vector"]).to_arrow()).numpy()
    return recall(exact(gallery, queries, 10), indexed(gallery, queries, 10))


def recall(right: Found, found: Found) -> float:
    """Share of the right rows that were found."""
    ids = [result.rows["id"].to_pylist() for result in (right, found)]
    pairs = zip(right.positions, found.positions, ~np.isnan(found.cosines))
    return float(np.mean([
        len({ids[0][i] for i in a} & {ids[1][i] for i in b[there]}) / len(a) for a, b, there in pairs
    ]))  # fmt: skip


def rows_of(gallery: Gallery) -> tuple[list[dict[str, Any]], np.ndarray]:
    """All rows of a gallery, described, and their vectors (N, D) in fp32."""
    batches = list(gallery.scan(("vector", *SHOWN)))
    rows = pa.Table.from_batches(batches) if batches else gallery.table.schema.empty_table()
    return rows.select(SHOWN).to_pylist(), vectors_of(rows).numpy()


def matches(found: Found, at_least: float = -1.0) -> list[list[dict[str, Any]]]:
    """Describe for each query what was found, the nearest first; of a track its nearest image and how many were found.

    Nobody of a cosine of at least so much is an answer too.
    """
    rows = found.rows.to_pylist()
    return [
        _grouped([(rows[i], float(c)) for i, c in zip(positions, cosines) if c >= at_least])
        for positions, cosines in zip(found.positions, found.cosines)
    ]


def vectors_of(rows: pa.RecordBatch | pa.Table) -> Tensor:
    """The vectors (N, D) of rows in fp32."""
    return stored_vectors(rows).float()


def stored_vectors(rows: pa.RecordBatch | pa.Table) -> Tensor:
    """The vectors (N, D) of rows as they are stored, in fp16 or fp32."""
    column = rows["vector"]
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return torch.from_dlpack(column.flatten()).view(len(rows), column.type.list_size)


def _fitting(gallery: Gallery, queries: np.ndarray) -> np.ndarray:
    if queries.ndim != 2 or queries.shape[1] != gallery.width:
        raise GalleryError(f"queries must be (Q, {gallery.width}), as {gallery.place} has vectors, got {queries.shape}")
    return np.ascontiguousarray(queries, dtype=np.float32)


def _grouped(rows: Sequence[tuple[dict[str, Any], float]]) -> list[dict[str, Any]]:
    """Put the images of one track, which one camera took of one person, into one entry."""
    groups: dict[Any, dict[str, Any]] = {}
    for row, cosine in rows:
        entry = {**row, "time": row["time"] and row["time"].isoformat(), "cosine": cosine}
        if row["track"] is None:
            groups[row["id"]] = {name: value for name, value in entry.items() if name != "track"}
        else:
            first = groups.setdefault((row["person"], row["camera"], row["track"]), {**entry, "images": 0})
            first["images"] += 1
    return list(groups.values())
