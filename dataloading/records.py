"""Data sets as the rest of the project sees them, `Split` of `Record`s, and the checks made before the first step."""

import io
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from fusionreid.errors import ReIDError

PARTS = ("train", "query", "gallery")
MAX_PIXELS = 25_000_000  # a larger header is a mistake or a decompression bomb
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # no format that starts another program
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"})
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter rule


class DataError(ReIDError, ValueError):
    """Something about the data that its owner can put right."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image file with its person and camera."""

    path: str  # absolute
    person: int  # as the data set numbers it; 0: distractor
    camera: int  # from 0


@dataclass(frozen=True)
class Split:
    """A data set in its three parts."""

    name: str
    root: str
    train: tuple[Record, ...]
    query: tuple[Record, ...]
    gallery: tuple[Record, ...]
    note: str = ""

    def __post_init__(self) -> None:
        for part in PARTS:
            if not getattr(self, part):
                raise DataError(
                    f"{self.name}: no images for {part} in {printable(self.root)}; all three parts are needed"
                )

    @cached_property
    def persons(self) -> tuple[int, ...]:
        """Persons to train on, sorted; the label of a person is its position."""
        return tuple(sorted({record.person for record in self.train}))

    @cached_property
    def labels(self) -> list[int]:
        """Label of the person of every training image."""
        label = {person: position for position, person in enumerate(self.persons)}
        return [label[record.person] for record in self.train]

    @cached_property
    def cameras(self) -> tuple[int, ...]:
        """Cameras seen in training, sorted."""
        return tuple(sorted({record.camera for record in self.train}))

    @property
    def num_persons(self) -> int:
        """Number of persons to train on."""
        return len(self.persons)

    @property
    def num_cameras(self) -> int:
        """Rows that an embedding of the training cameras needs."""
        return self.cameras[-1] + 1

    def describe(self) -> str:
        """Table of images, persons and cameras per part."""
        lines = [f"{self.name} in {printable(self.root)}", f"{'part':8}{'images':>10}{'persons':>10}{'cameras':>10}"]
        for part in PARTS:
            records = getattr(self, part)
            persons, cameras = {r.person for r in records}, {r.camera for r in records}
            lines.append(f"{part:8}{len(records):>10,}{len(persons):>10,}{len(cameras):>10}")
        return "\n".join([*lines, *([self.note] if self.note else [])])


def printable(path: str | os.PathLike[str]) -> str:
    """Text of a path that every terminal and log can take, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def list_images(folder: str | Path) -> tuple[list[str], int]:
    """Return the image files directly in a folder, sorted, and the count of irregular entries with an image's name.

    Links to files count as files; `._*` (macOS) and other files are passed over. Opens nothing, so nothing can hang.
    """
    found, skipped = [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("._") or os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                continue
            if _is_regular(entry):
                found.append(entry.path)
            else:
                skipped += 1
    return sorted(found), skipped


def find_images(path: Path) -> tuple[Record, ...]:
    """Return one image, or all in a folder and the folders inside it, sorted; person and camera are unknown."""
    if path.is_file():
        paths = [str(path.absolute())]
    else:
        paths = [image for folder, _, _ in os.walk(path.absolute()) for image in list_images(folder)[0]]
    if not paths:
        raise DataError(f"{printable(path)} holds no images; name an image, or a folder with some in it or below it")
    return tuple(Record(image, -1, -1) for image in sorted(paths))


def _is_regular(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Open a regular file for reading; a FIFO or a device raises instead of blocking."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        yield file


def read_file(path: str) -> bytes:
    """Read a regular file whole."""
    with open_file(path) as file:
        return file.read()


def open_image(source: bytes | BinaryIO) -> Image.Image:
    """Read the header only. ValueError or OSError: it is no image, or one too large."""
    if not source:
        raise ValueError("empty file")
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError("not an image, or its header is cut short") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"its header says more than {MAX_PIXELS:,} pixels") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"its header says {width} x {height} pixels, more than {MAX_PIXELS:,}")
    return image


def check_batch(split: Split, batch_size: int, instances: int, world_size: int = 1) -> None:
    """Raise DataError unless a batch is P persons x K instances and each rank can take whole persons."""
    persons, rest = divmod(batch_size, instances)
    if rest or not persons:
        raise DataError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of DATALOADER.NUM_INSTANCE, got {batch_size} = "
            f"{persons} x {instances} + {rest}; the next is {(persons + 1) * instances}"
        )
    if persons % world_size:
        raise DataError(
            f"each of {world_size} processes takes whole persons of a batch: SOLVER.IMS_PER_BATCH must be a multiple "
            f"of {world_size} x {instances} = {world_size * instances}, got {batch_size} = {persons} x {instances}"
        )
    if split.num_persons < persons:
        raise DataError(
            f"{split.name} has {split.num_persons} persons to train on, a batch needs {persons} "
            f"({batch_size} images / {instances} per person); SOLVER.IMS_PER_BATCH may be at most "
            f"{split.num_persons * instances} here"
        )


def scarce_persons(split: Split, instances: int) -> int:
    """Count the persons that have fewer training images than a batch takes, so that images repeat."""
    return sum(count < instances for count in Counter(record.person for record in split.train).values())
