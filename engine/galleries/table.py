"""A gallery: a table of LanceDB with one row per image, in a folder or in object storage.

The id of a row is the digest of the image file. LanceDB is told that it is the primary key: two writers that add one
image at the same time then leave one row. Every change makes a version, to which `restore` goes back.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fusionreid.dataloading.records import printable
from fusionreid.errors import ReIDError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX = ".lance"
MODEL = b"fusionreid.model"  # in the metadata of the schema: Embedder.model_digest
KEY = {"lance-schema:unenforced-primary-key": "true"}
TEXTS = ("person", "camera", "track", "path")
SHOWN = ("id", "person", "camera", "time", "track", "path")
COMMIT = timedelta(minutes=10)  # within which writers that meet come to terms
KEPT_DAYS = 7  # in which a change can be undone


class GalleryError(ReIDError, ValueError):
    """A gallery that is not there, or is not what a command needs."""


class MissingExtraError(ReIDError, ImportError):
    """An optional package is not installed."""


class Change(NamedTuple):
    """A version of a gallery: its number, its time and its rows."""

    version: int
    time: datetime
    rows: int


def needed(module: str, extra: str) -> Any:
    """Import an optional package; MissingExtraError says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{module.partition('.')[0]} cannot be imported ({error}), which galleries need: "
                                f"pip install 'fusionreid[{extra}]'") from error  # fmt: skip


def is_gallery(place: str | Path) -> bool:
    """Tell whether a place is a gallery, with or without its suffix: any URI is taken for one."""
    path = str(place).rstrip("/").removesuffix(SUFFIX)
    return "://" in path or Path(f"{path}{SUFFIX}", "_versions").is_dir()


def divide(place: str | Path) -> tuple[str, str]:
    """Divide the place of a gallery, `galleries/shop` or `s3://bucket/shop.lance`, into its database and its name."""
    folder, _, name = str(place).rstrip("/").removesuffix(SUFFIX).rpartition("/")
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or folder.endswith(":/"):
        raise GalleryError(
            f"{printable(str(place))} cannot be a gallery: name it as in galleries/shop or s3://bucket/shop, by "
            "letters, digits, dots, dashes and underscores"
        )
    return folder or ("/" if str(place).startswith("/") else "."), name


class Gallery:
    """Rows of a person's image each: id, vector, person, camera, time, track, path; what is not known is null."""

    def __init__(self, place: str | Path, table: Any) -> None:
        self.place, self.table = str(place), table

    @classmethod
    def open(cls, place: str | Path, model: str | None = None) -> "Gallery":
        """Open a gallery; GalleryError if there is none, or if its vectors are not those of `model`, a digest."""
        folder, name = divide(place)
        try:
            gallery = cls(place, needed("lancedb", "gallery").connect(folder).open_table(name))
        except (ValueError, OSError, RuntimeError) as error:
            raise GalleryError(
                f"there is no gallery {printable(str(place))} ({error}): fusionreid embed --images FOLDER --to "
                f"{printable(str(place))} makes it"
            ) from error
        if MODEL not in (gallery.table.schema.metadata or {}):
            raise GalleryError(f"{place} is a table of LanceDB, but no gallery: its schema names no model")
        if model not in (None, gallery.model):
            raise GalleryError(
                f"{printable(str(place))} holds vectors of another model ({gallery.model}, this one is {model}), and "
                "those of two models cannot be compared: name the checkpoint that it was made with, or embed its "
                "images again into a new gallery"
            )
        return gallery

    @classmethod
    def create(cls, place: str | Path, model: str, width: int, dtype: str = "") -> "Gallery":
        """Open a gallery, made if it is not there yet, for vectors (width,) of `model`, in fp16 or fp32."""
        folder, name = divide(place)
        with reported(place):
            database = needed("lancedb", "gallery").connect(folder)
            try:
                database.open_table(name)
            except (ValueError, FileNotFoundError):
                database.create_table(name, schema=schema(model, width, dtype or "fp16"), exist_ok=True)
        gallery = cls.open(place, model)
        if dtype not in ("", gallery.dtype):
            raise GalleryError(f"{place} keeps vectors in {gallery.dtype}, not in {dtype}: leave --dtype out")
        return gallery

    @property
    def model(self) -> str:
        """Digest of the model that its vectors are of."""
        return self.table.schema.metadata[MODEL].decode()

    @property
    def width(self) -> int:
        """Width D of a vector."""
        return self.table.schema.field("vector").type.list_size

    @property
    def dtype(self) -> str:
        """Type of a component of a vector: fp16 or fp32."""
        return "fp16" if self.table.schema.field("vector").type.value_type.bit_width == 16 else "fp32"

    def __len__(self) -> int:
        return self.table.count_rows()

    def add(self, rows: "pa.Table") -> int:
        """Add those rows whose ids are not there yet, and return how many these were."""
        if not len(rows):
            return 0
        with reported(self.place):  # by the index, LanceDB does not see the rows of another writer at that moment
            merge = self.table.merge_insert("id").when_not_matched_insert_all().use_index(False)
            return merge.execute(rows.cast(self.table.schema), timeout=COMMIT).num_inserted_rows

    def known(self, ids: Sequence[str]) -> set[str]:
        """Return those of the ids that have a row."""
        self.table.checkout_latest()
        found = self.table.search().where(f"id IN ({', '.join(map(quoted, ids))})").select(["id"]).limit(None)
        return set(found.to_arrow()["id"].to_pylist()) if ids else set()

    def scan(self, columns: Sequence[str], where: str = "", batch: int = 2**14) -> Iterator["pa.RecordBatch"]:
        """Yield columns of the rows that a condition holds for, batch by batch."""
        query = self.table.search().select(list(columns)).limit(None)
        yield from (query.where(where) if where else query).to_batches(batch)

    def remove(self, where: str) -> int:
        """Remove rows, and return how many these were; until `vacuum`, `restore` brings them back."""
        with reported(self.place):
            return self.table.delete(where).num_deleted_rows

    def rename(self, where: str, person: str | None) -> int:
        """Give rows another person, and return how many these were; None: not known."""
        with reported(self.place):
            return self.table.update(where=where, values={"person": person}).rows_updated

    def merge(self, other: "Gallery") -> int:
        """Add the rows of another gallery of this model, and return how many were new."""
        Gallery.open(other.place, self.model)
        names = self.table.schema.names
        pyarrow = needed("pyarrow", "gallery")
        return sum(self.add(pyarrow.Table.from_batches([rows])) for rows in other.scan(names))

    def changes(self) -> list[Change]:
        """List the versions, the newest last."""
        return [
            Change(v["version"], v["timestamp"], int(v["metadata"]["total_rows"])) for v in self.table.list_versions()
        ]

    def restore(self, version: int) -> None:
        """Make an earlier version the newest one."""
        try:
            self.table.restore(version)
        except ValueError as error:
            raise GalleryError(f"{self.place} has no version {version}: {error}") from error

    def index_ids(self) -> None:
        """Index the ids of all rows: without, `add` compares with those of every row added since."""
        needed("lance", "gallery")
        with reported(self.place):
            if not any(index.columns == ["id"] for index in self.table.list_indices()):
                self.table.create_index("id", config=needed("lancedb.index", "gallery").BTree())
            self.table.to_lance().optimize.optimize_indices(index_names=["id_idx"])
            self.table.checkout_latest()

    def vacuum(self, keep_days: float = KEPT_DAYS) -> None:
        """Join small files, rewrite those with removed rows, index the ids and delete versions older than that.

        LanceDB's own `optimize` leaves a removed row in its file until one in ten rows there is gone.
        """
        self.index_ids()
        with reported(self.place):
            self.table.to_lance().optimize.compact_files(materialize_deletions_threshold=0.0)
            self.table.checkout_latest()
            self.table.optimize(cleanup_older_than=timedelta(days=keep_days))


def schema(model: str, width: int, dtype: str) -> "pa.Schema":
    """The columns of a gallery for vectors (width,) of a model."""
    pa = needed("pyarrow", "gallery")
    fields = [
        pa.field("id", pa.string(), nullable=False, metadata=KEY),
        pa.field("vector", pa.list_(pa.float16() if dtype == "fp16" else pa.float32(), width), nullable=False),
        *(pa.field(name, pa.string()) for name in TEXTS),
        pa.field("time", pa.timestamp("us", "UTC")),
    ]
    return pa.schema(fields, metadata={MODEL: model.encode()})


def condition(
    *, person: str | None = None, camera: str | Sequence[str] = (), track: str | None = None, path: str | None = None,
    since: datetime | None = None, before: datetime | None = None, seen: tuple[str, datetime] | None = None,
) -> str:  # fmt: skip
    """Compose the condition that all given hold; `seen`, a camera and a time: not by it within a minute of then."""
    texts = {"person": person, "track": track, "path": path}
    parts = [f"{name} = {quoted(text)}" for name, text in texts.items() if text is not None]
    parts += (
        [f"camera IN ({', '.join(map(quoted, [camera] if isinstance(camera, str) else camera))})"] if camera else []
    )
    parts += [f"time >= {_time(since)}"] if since else []
    parts += [f"time < {_time(before)}"] if before else []
    if seen:
        minute = timedelta(minutes=1)
        between = f"time BETWEEN {_time(seen[1] - minute)} AND {_time(seen[1] + minute)}"
        parts.append(f"(camera = {quoted(seen[0])} AND {between}) IS NOT TRUE")
    return " AND ".join(parts)


def quoted(text: str) -> str:
    """A text as SQL has it."""
    return "'" + text.replace("'", "''") + "'"


def _time(time: datetime) -> str:
    return f"timestamp '{time.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}'"


@contextmanager
def reported(place: str | Path) -> Iterator[None]:
    """Turn what LanceDB says of a disk, of a bucket or of other writers into a StorageError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, ReIDError):
            raise
        raise StorageError(f"the gallery {printable(str(place))} cannot be written: {error}") from error
