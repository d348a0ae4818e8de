"""Adding images to a gallery: from a folder, a list or a bucket, in this process or on a Ray cluster."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
from pyarrow import fs

from fusionreid.dataloading.image_files import SUFFIXES, find_files
from fusionreid.dataloading.records import DataError, printable
from fusionreid.engine.checkpoints.load_model import find_checkpoint
from fusionreid.engine.config import Config
from fusionreid.engine.embedder import Embedder
from fusionreid.engine.galleries import stages
from fusionreid.engine.galleries.shards import SUFFIX, unpacked
from fusionreid.engine.galleries.table import Gallery, needed
from fusionreid.errors import ReIDError, StorageError

AHEAD = 2  # batches decoded before they are needed
WRITERS = 4  # on a cluster: each commit waits for the one before it
INDEXED_ROWS = 2**16  # new ones, among which every commit looks for its ids one by one
NAMED = 20  # faulty images in a warning
LISTED = {"path": pa.string(), "person": pa.string(), "camera": pa.string(), "track": pa.string(), "time": stages.TIME}

log = logging.getLogger(__name__)


class Added(NamedTuple):
    """What became of the images: rows added, images that were there already or twice, images that cannot be used."""

    added: int
    known: int
    faults: list[str]


class Chain(NamedTuple):
    """The stages that images pass through: `read`, an embedding made by `make_embed` in its process, `write`.

    `write` takes about `commit_rows` at once, given how many more than the gallery has are to come.
    """

    read: Callable[[pa.Table], pa.Table]
    make_embed: Callable[[], stages.Embed]
    write: Callable[[pa.Table], pa.Table]
    commit_rows: Callable[[int], int]


def add(
    cfg: Config, images: str, place: str, *, dtype: str = "", given: Mapping[str, str] | None = None, ray: str = ""
) -> Added:
    """Embed the images that a gallery does not have yet, and add them, made if it is not there.

    `images` is an image, a folder, a tar shard, a CSV or Parquet list with the columns path and, if known, person,
    camera, track and time, or the URI of one. `dtype`, fp16 or fp32, is by default the gallery's, fp16 in a new one.
    `given` are values for what is not listed. `ray` is the address of a cluster, or auto.
    """
    images, place = _absolute(images), _absolute(place)
    weights = str(find_checkpoint(cfg).absolute())  # the same for all workers, whatever training writes meanwhile
    cfg = cfg.model_copy(update={"TEST": cfg.TEST.model_copy(update={"WEIGHT": weights})})
    embedder = Embedder(cfg, device="cpu")
    model, width = embedder.model_digest, embedder.dimension
    dtype = Gallery.create(place, model, width, dtype).dtype
    root = images.rpartition("/")[0]

    def commit_rows(coming: int) -> int:
        return stages.commit_rows(len(Gallery.open(place)) + coming, width, dtype)

    read = partial(stages.read, place=place, given=dict(given or {}), root=root)
    chain = Chain(read, partial(stages.Embed, cfg, model, dtype), partial(stages.write, place=place), commit_rows)
    results = _on_ray(images, chain, ray) if ray else _here(images, chain)
    done, indexed = Added(0, 0, []), 0
    for table in results:
        faults = [fault for faults in table["faults"].to_pylist() for fault in faults]
        done = Added(
            done.added + sum(table["added"].to_pylist()), done.known + sum(table["known"].to_pylist()),
            done.faults + faults,
        )  # fmt: skip
        log.info("%d added, %d were there, %d cannot be used", done.added, done.known, len(done.faults))
        if done.added - indexed >= INDEXED_ROWS:
            indexed = done.added
            with suppress(StorageError):  # another writer was there; what is lost is speed
                Gallery.open(place).index_ids()
    return _checked(done, images)


def listed(images: str) -> Iterator[pa.Table]:
    """Yield the images at a place in tables of a few hundred, and each shard in one, as `unpacked` takes them."""
    with _explained(images):
        if images.endswith((".parquet", ".csv")):
            yield from (pa.Table.from_batches([batch]) for batch in _rows_of(images))
            return
        found = _paths(images)
        for shard in (path for path in found if path.endswith(SUFFIX)):
            yield pa.table({"shard": pa.array([os.fsencode(shard)], pa.binary())})
        paths = (path for path in found if not path.endswith(SUFFIX))
        while some := [os.fsencode(path) for path in islice(paths, stages.READ_ROWS)]:  # which need not be UTF-8
            yield pa.table({"path": pa.array(some, pa.binary())})


@contextmanager
def _explained(images: str) -> Iterator[None]:
    """Turn what Arrow says of a list, a folder or a bucket into a DataError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{printable(images)} cannot be read: {error}; expected: an image, a folder, a .tar shard, or a .csv or "
            ".parquet list with the column path and, if known, person, camera, track and time with its zone, "
            "2026-03-01T12:00:00Z"
        ) from error


def _rows_of(images: str) -> Iterator[pa.RecordBatch]:
    files, path = fs.FileSystem.from_uri(images)
    if images.endswith(".parquet"):
        yield from pa.dataset.dataset(path, filesystem=files).to_batches(batch_size=stages.READ_ROWS)
        return
    options = pa.csv.ConvertOptions(column_types=LISTED, strings_can_be_null=True, timestamp_parsers=[pa.csv.ISO8601])
    with files.open_input_stream(path) as file:
        for batch in pa.csv.open_csv(file, convert_options=options):
            yield from (batch.slice(i, stages.READ_ROWS) for i in range(0, len(batch), stages.READ_ROWS))


def _paths(images: str) -> list[str]:
    if "://" not in images:
        if os.path.isfile(images):
            return [images]
        if not os.path.isdir(images):
            raise DataError(f"there is no {printable(images)}: name an image, a folder, a .csv or .parquet list, or a "
                            ".tar shard")  # fmt: skip
        paths, left_out = find_files(images)
        for why, some in left_out.items():
            log.warning("%d left out, such as %s: %s", len(some), printable(some[0]), why)
        shards = (os.path.join(folder, name) for folder, _, names in os.walk(images) for name in names)
        return [*paths, *sorted(path for path in shards if path.endswith(SUFFIX))]
    if images.endswith(SUFFIX):
        return [images]
    files, base = fs.FileSystem.from_uri(images)
    entries = files.get_file_info(fs.FileSelector(base, recursive=True))
    scheme = images.split("://")[0]
    return sorted(
        f"{scheme}://{e.path}" for e in entries if e.is_file and Path(e.path).suffix.lower() in {*SUFFIXES, SUFFIX}
    )


def _here(images: str, chain: Chain) -> Iterator[pa.Table]:
    """Run the stages in this process; the next batches are decoded while one is embedded."""
    embed, pending, some = chain.make_embed(), deque[Any](), list[pa.Table]()
    tables, enough = (part for table in listed(images) for part in unpacked(table)), chain.commit_rows(0)
    with ThreadPoolExecutor(AHEAD) as threads:
        pending.extend(threads.submit(chain.read, table) for table in islice(tables, AHEAD))
        while pending:
            some.append(embed(pending.popleft().result()))
            pending.extend(threads.submit(chain.read, table) for table in islice(tables, 1))
            if not pending or sum(map(len, some)) >= enough:
                yield chain.write(pa.concat_tables(some))
                some.clear()
                enough = chain.commit_rows(0)


def _on_ray(images: str, chain: Chain, address: str) -> Iterator[pa.Table]:
    """Run the stages on a cluster: decoding in tasks, one model per GPU, or per core where there is none."""
    ray, data = needed("ray", "scale"), needed("ray.data", "scale")
    ray.init(None if address == "auto" else address, ignore_reinit_error=True)
    gpus, cores = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    with _explained(images):
        rows = data.read_parquet(images) if images.endswith(".parquet") else data.from_arrow(list(listed(images)))
        commit = chain.commit_rows(rows.count())
    size = stages.READ_ROWS if images.endswith(".parquet") else None  # a task reads a shard, or a table of paths
    arrow = {"batch_format": "pyarrow"}

    class Worker:  # Ray takes a class, and makes an object of it on each worker
        def __init__(self) -> None:
            self.embed = chain.make_embed()

        def __call__(self, table: pa.Table) -> pa.Table:
            return self.embed(table)

    pool = data.ActorPoolStrategy(min_size=1, max_size=gpus or max(1, cores // 2))
    done = (
        rows.map_batches(lambda table: (chain.read(part) for part in unpacked(table)), batch_size=size, **arrow)
        .map_batches(Worker, batch_size=stages.READ_ROWS, compute=pool, num_gpus=1 if gpus else 0, **arrow)
        .map_batches(chain.write, batch_size=commit, compute=data.TaskPoolStrategy(WRITERS), **arrow)
    )
    try:
        yield from done.iter_batches(**arrow)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        raise (cause if isinstance(cause, ReIDError) else error) from error


def _checked(done: Added, images: str) -> Added:
    if not done.added and not done.known:
        why = f"; the first: {done.faults[0]}" if done.faults else ""
        raise DataError(f"{printable(images)} holds no images that can be used{why}")
    if done.faults:
        more = f"\n  and {len(done.faults) - NAMED:,} more" if len(done.faults) > NAMED else ""
        log.warning("%d images cannot be used and were left out:%s%s", len(done.faults),
                    "".join(f"\n  {fault}" for fault in done.faults[:NAMED]), more)  # fmt: skip
    return done


def _absolute(place: str) -> str:
    """A place as every process of a cluster can find it."""
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))
