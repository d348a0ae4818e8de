"""Galleries: images embedded into a table beside a file, exact and indexed search beside faiss and LanceDB alone.

Vectors are made up, fp16 in the table, with fifty images per person. Recall@10 and bytes on disk are printed where a
case is made ready. Without LanceDB there are no cases; without faiss it is left out.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.timing import Case, Settings, Work
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import Config, load_config
from fusionreid.engine.evaluation.extract import embed_to_folder

SOURCES = ("engine/galleries/*.py", "engine/embedder.py", "engine/evaluation/extract.py", "kernels/neighbours.py")
NEAREST, PIECE, IMAGES_OF_A_PERSON, QUERIES = 10, 2**17, 50, 100
ROWS = {"quick": (1_000, 16), "default": (1_000_000, 512), "full": (10_000_000, 512)}  # and width
CROPS = {"quick": 16, "default": 1024, "full": 8192}
HALF_PRECISION = 2e-3  # of cosines, from vectors in fp16


def cases(settings: Settings) -> list[Case]:
    """List the cases of a size."""
    if not find_spec("lancedb"):
        print("gallery: LanceDB is not installed: pip install 'fusionreid[gallery]'", file=sys.stderr)
        return []
    rows, width = ROWS[settings.size]
    shape = f"1 query, G {rows:,}, D {width}, float16"
    crops = f"{CROPS[settings.size]:,} images of 128 x 64"
    return [
        Case("embedding into a gallery", crops, partial(embedding, settings)),
        Case(f"{NEAREST} nearest, exactly", shape, partial(exact_search, rows, width)),
        *(
            Case(f"{NEAREST} nearest by an index, {kind}", shape, partial(indexed_search, rows, width, kind))
            for kind in ("ivf_pq", "hnsw")
        ),
    ]


@contextmanager
def embedding(settings: Settings) -> Iterator[Work]:
    """Prepare the embedding of a folder into a new table, and into a file."""
    from fusionreid.engine.galleries.adding import add

    count, random = CROPS[settings.size], np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        cfg, crops, tables = _run(Path(folder)), Path(folder, "crops"), iter(range(10**6))
        crops.mkdir()
        for i in range(count):
            pixels = np.kron(random.integers(0, 256, (16, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
            Image.fromarray(pixels).save(crops / f"{i}.jpg")

        add(cfg, str(crops), f"{folder}/known")

        def into_table() -> int:
            return add(cfg, str(crops), f"{folder}/gallery{next(tables)}").added

        providers: dict[str, Callable[[], int]] = {
            "ours": into_table,
            "ours, into a file of vectors": lambda: embed_to_folder(cfg, crops, Path(folder, "file")),
            "ours, nothing new": lambda: add(cfg, str(crops), f"{folder}/known").known,
        }
        yield Work(providers, 0, compared=lambda done: [torch.tensor(done)], items=count, on_host=True)


@contextmanager
def exact_search(rows: int, width: int) -> Iterator[Work]:
    """Prepare the exact search in a table and in memory."""
    from fusionreid.engine.galleries import find

    with _filled(rows, width) as (gallery, query):
        providers: dict[str, Callable[[], Any]] = {
            "ours": lambda: find.exact(gallery, query[:1], NEAREST).cosines,
            "LanceDB": lambda: _by_lancedb(gallery.table.search(query[0]).bypass_vector_index()),
        }
        if find_spec("faiss"):
            faiss = import_module("faiss")
            flat = faiss.IndexFlatIP(width)
            for vectors in _vectors(gallery):
                flat.add(vectors)
            providers["faiss in fp32, in memory"] = lambda: flat.search(query[:1], NEAREST)[0]
        yield Work(providers, HALF_PRECISION, 2 * rows * width, 2 * rows * width, _cosines, on_host=True)


@contextmanager
def indexed_search(rows: int, width: int, kind: str) -> Iterator[Work]:
    """Prepare the search by an index of LanceDB, and by faiss as it would do the same."""
    from fusionreid.engine.galleries import find

    with _filled(rows, width) as (gallery, query):
        find.build_index(gallery, kind)
        right = find.exact(gallery, query, NEAREST)
        mine = find.recall(right, find.indexed(gallery, query, NEAREST))
        megabytes = (
            sum(path.stat().st_size for path in Path(f"{gallery.place}.lance").rglob("*") if path.is_file()) / 1e6
        )
        print(f"gallery: {kind} of {rows:,} rows: recall@{NEAREST} {mine:.1%}, {megabytes:,.0f} MB on disk")
        providers: dict[str, Callable[[], Any]] = {
            "ours": lambda: find.indexed(gallery, query[:1], NEAREST).cosines,
            "LanceDB, without exact distances": lambda: _by_lancedb(gallery.table.search(query[0])),
        }
        if find_spec("faiss"):
            index = _faiss_index(gallery, rows, width, kind)
            ids = np.array(gallery.table.search().select(["id"]).limit(None).to_arrow()["id"].to_pylist())
            found, best = ids[index.search(query, NEAREST)[1]], np.array(right.rows["id"].to_pylist())[right.positions]
            share = np.mean([len(set(a) & set(b)) / NEAREST for a, b in zip(found, best)])
            print(f"gallery: {kind} of faiss: recall@{NEAREST} {share:.1%}")
            providers["faiss, in memory"] = lambda: index.search(query[:1], NEAREST)[0]
        yield Work(providers, 0, compared=lambda _: [], on_host=True)


def _run(folder: Path) -> Config:
    """A run of the demo's model with random weights."""
    cfg = load_config("synthetic/tiny", [f"OUTPUT_DIR={folder}/run"])
    state = {"classes": 5, "cameras": (0, 1), "camera_names": ["a", "b"], "config": cfg.model_dump(mode="json")}
    checkpoint.save(folder / "run/checkpoints", 1, {"model": build(cfg, 5, 2).state_dict()}, state)
    return cfg


@contextmanager
def _filled(rows: int, width: int) -> Iterator[tuple[Any, np.ndarray]]:
    """Fill a gallery with made-up vectors, and make queries near to some."""
    import pyarrow as pa

    from fusionreid.engine.galleries.table import Gallery

    random = np.random.default_rng(0)
    centers = random.standard_normal((max(rows // IMAGES_OF_A_PERSON, 1), width), np.float32)

    def near(count: int) -> np.ndarray:
        vectors = centers[random.integers(len(centers), size=count)]
        vectors = vectors + random.standard_normal(vectors.shape, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    with TemporaryDirectory() as folder:
        gallery = Gallery.create(f"{folder}/made", "made up", width)
        for start in range(0, rows, PIECE):
            vectors = near(min(PIECE, rows - start)).astype(np.float16)
            columns: dict[str, Any] = dict.fromkeys(gallery.table.schema.names, pa.nulls(len(vectors)))
            columns["id"] = [f"{i:032x}" for i in range(start, start + len(vectors))]
            columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
            gallery.table.add(pa.table(columns).cast(gallery.table.schema))
        yield gallery, near(QUERIES)


def _vectors(gallery: Any) -> Iterator[np.ndarray]:
    from fusionreid.engine.galleries.find import vectors_of

    return (vectors_of(rows).numpy() for rows in gallery.scan(["vector"]))


def _faiss_index(gallery: Any, rows: int, width: int, kind: str) -> Any:
    from fusionreid.engine.galleries.find import REFINED

    faiss = import_module("faiss")
    cells = max(1, round(rows**0.5))
    codes = "HNSW20,SQ8" if kind == "hnsw" else f"IVF{cells},PQ{width // 16}"
    index = faiss.index_factory(width, f"{codes},RFlat", faiss.METRIC_INNER_PRODUCT)
    index.k_factor = REFINED
    learnt = np.concatenate([vectors for vectors, _ in zip(_vectors(gallery), range(16))])
    index.train(learnt)
    for vectors in _vectors(gallery):
        index.add(vectors)
    if kind == "ivf_pq":
        faiss.extract_index_ivf(index).nprobe = min(20, cells)  # as LanceDB
    return index


def _by_lancedb(search: Any) -> np.ndarray:
    table = search.distance_type("cosine").limit(NEAREST).select(["id", "_distance"]).to_arrow()
    return 1 - table["_distance"].to_numpy()[None]


def _cosines(found: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(found, np.float64))]
