"""Galleries: images embedded into a table beside a file, exact and indexed search beside faiss and LanceDB alone.

Vectors are made up, with fifty images per person, fp16 in the table that is searched exactly, fp32 in the one with an
index, which takes LanceDB a tenth of the time to build. Recall@10 and bytes on disk are printed where a case is made
ready. Without LanceDB there are no cases; without faiss it is left out. Ten million rows have no hnsw, whose build
would take hours, and few calls of the exact search.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.filled_gallery import filled, megabytes
from bench.timing import FEWEST_ROUNDS, P95_CALLS, Case, Settings, Work
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import Config, load_config
from fusionreid.engine.evaluation.extract import embed_to_folder

SOURCES = ("engine/galleries/*.py", "engine/embedder.py", "engine/evaluation/extract.py", "kernels/neighbours.py",
           "bench/filled_gallery.py")  # fmt: skip
NEAREST, RECALL_QUERIES = 10, 100
ROWS = {"quick": (1_000, 16), "default": (1_000_000, 512), "full": (10_000_000, 512)}  # and width
CROPS = {"quick": 16, "default": 1024, "full": 8192}
HALF_PRECISION = 2e-3  # of cosines, from vectors in fp16


def cases(settings: Settings) -> list[Case]:
    """List the cases of a size."""
    if not find_spec("lancedb"):
        print("gallery: LanceDB is not installed: pip install 'fusionreid[gallery]'", file=sys.stderr)
        return []
    rows, width = ROWS[settings.size]
    shape = f"1 query, G {rows:,}, D {width}"
    crops = f"{CROPS[settings.size]:,} images of 128 x 64"
    return [
        Case("embedding into a gallery", crops, partial(embedding, settings)),
        Case(f"{NEAREST} nearest, exactly", f"{shape}, float16", partial(exact_search, rows, width)),
        *(
            Case(
                f"{NEAREST} nearest by an index, {kind}",
                f"{shape}, float32",
                partial(indexed_search, rows, width, kind),
            )
            for kind in (("ivf_pq",) if settings.size == "full" else ("ivf_pq", "hnsw"))
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

    gallery, queries = filled(rows, width)
    searches: dict[str, Callable[[np.ndarray], Any]] = {
        "ours": lambda query: find.exact(gallery, query, NEAREST).cosines,
        "LanceDB": lambda query: _by_lancedb(gallery.table.search(query[0]).bypass_vector_index()),
    }
    if _has_faiss("faiss in fp32", 4 * rows * width):
        flat = import_module("faiss").IndexFlatIP(width)
        for vectors in _vectors(gallery):
            flat.add(vectors)
        searches["faiss in fp32, in memory"] = lambda query: flat.search(query, NEAREST)[0]
    yield Work(_providers(searches, queries), HALF_PRECISION, 2 * rows * width, 2 * rows * width, _cosines,
               on_host=True, fewest_rounds=P95_CALLS if rows <= ROWS["default"][0] else FEWEST_ROUNDS)  # fmt: skip


@contextmanager
def indexed_search(rows: int, width: int, kind: str) -> Iterator[Work]:
    """Prepare the search by an index of LanceDB, and by faiss as it would do the same."""
    from fusionreid.engine.galleries import find

    gallery, queries = filled(rows, width, "fp32")
    before, start = megabytes(gallery), perf_counter()
    find.build_index(gallery, kind)
    seconds, added, asked = perf_counter() - start, megabytes(gallery) - before, queries[:RECALL_QUERIES]
    right = find.exact(gallery, asked, NEAREST)
    mine = find.recall(right, find.indexed(gallery, asked, NEAREST))
    print(f"gallery: {kind} of {rows:,} rows: recall@{NEAREST} {mine:.1%}, built in {seconds:,.1f} s, "
          f"{added:,.0f} MB on disk")  # fmt: skip
    searches: dict[str, Callable[[np.ndarray], Any]] = {
        "ours": lambda query: find.indexed(gallery, query, NEAREST).cosines,
        "LanceDB, without exact distances": lambda query: _by_lancedb(gallery.table.search(query[0])),
    }
    if _has_faiss(f"{kind} of faiss", 5 * rows * width):  # fp32, and codes of up to a byte
        start = perf_counter()
        index = _faiss_index(gallery, rows, width, kind)
        seconds = perf_counter() - start
        ids = np.array(gallery.table.search().select(["id"]).limit(None).to_arrow()["id"].to_pylist())
        found, best = ids[index.search(asked, NEAREST)[1]], np.array(right.rows["id"].to_pylist())[right.positions]
        share = np.mean([len(set(a) & set(b)) / NEAREST for a, b in zip(found, best)])
        print(f"gallery: {kind} of faiss: recall@{NEAREST} {share:.1%}, built in {seconds:,.1f} s")
        searches["faiss, in memory"] = lambda query: index.search(query, NEAREST)[0]
    providers = _providers(searches, queries)
    yield Work(providers, 0, compared=lambda _: [], on_host=True, fewest_rounds=P95_CALLS)


def _providers(
    searches: Mapping[str, Callable[[np.ndarray], Any]], queries: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """Make providers that search for another query (1, D) in each call, all in the same order."""

    def provider(search: Callable[[np.ndarray], Any]) -> Callable[[], Any]:
        turns = cycle(queries[:, None])
        return lambda: search(next(turns))

    return {name: provider(search) for name, search in searches.items()}


def _run(folder: Path) -> Config:
    """A run of the demo's model with random weights."""
    cfg = load_config("synthetic/tiny", [f"OUTPUT_DIR={folder}/run"])
    state = {"classes": 5, "cameras": (0, 1), "camera_names": ["a", "b"], "config": cfg.model_dump(mode="json")}
    checkpoint.save(folder / "run/checkpoints", 1, {"model": build(cfg, 5, 2).state_dict()}, state)
    return cfg


def _has_faiss(name: str, needed: int) -> bool:
    """Whether faiss is there, and so many bytes are at most half of the memory."""
    if not find_spec("faiss"):
        return False
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * needed > memory:
        print(f"gallery: {name} is left out: it needs {needed / 2**30:,.1f} GiB, more than half of the memory of "
              f"{memory / 2**30:,.1f} GiB", file=sys.stderr)  # fmt: skip
    return 2 * needed <= memory


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
    if kind == "ivf_pq":  # both as LanceDB
        faiss.extract_index_ivf(index).nprobe = min(20, cells)
    else:
        faiss.downcast_index(index.base_index).hnsw.efSearch = 3 * REFINED * NEAREST // 2
    return index


def _by_lancedb(search: Any) -> np.ndarray:
    table = search.distance_type("cosine").limit(NEAREST).select(["id", "_distance"]).to_arrow()
    return 1 - table["_distance"].to_numpy()[None]


def _cosines(found: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(found, np.float64))]
