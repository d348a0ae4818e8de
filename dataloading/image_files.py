"""Image files on disk: finding all below a folder, and opening one without surprises."""

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from fusionreid.dataloading.records import HIDDEN, DataError, LeftOut, Record, printable

MAX_PIXELS = 25_000_000  # a larger header is a mistake or a decompression bomb
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # no format that starts another program
# fmt: off
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".ppm",
            ".pgm", ".pbm", ".pnm"}
FOREIGN = {".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".jxr", ".tga", ".psd", ".svg", ".ico", ".exr", ".hdr",
           ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".rw2", ".orf"}  # images that are not read
OTHER = {".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".yml", ".yaml", ".xml", ".html", ".pdf", ".mat", ".npy",
         ".npz", ".pkl", ".pth", ".py", ".sh", ".log", ".db", ".ini", ".zip", ".gz", ".tar", ".safetensors", ".lock",
         ".partial", ".mp4", ".avi", ".mov", ".mkv"}  # surely no images: they are not opened
# fmt: on
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")
METADATA = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})  # folders that systems fill with copies and thumbnails
MAX_LINKS = 3  # links to folders on one path
IRREGULAR = "not a regular file: a dangling link, a FIFO or a device"
LOOP, MISNAMED = "a link to a folder that leads back", "an image by its content, without the suffix of an image"
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter rule


def find_files(root: str | Path) -> tuple[list[str], LeftOut]:
    """Return all usable image files below a folder, sorted, and all other image-like entries by reason.

    Links to folders are followed, unless they lead back. Only files with an unknown suffix are opened, for their first
    bytes.
    """
    found: list[str] = []
    left_out: LeftOut = {}
    folders = [(str(root), frozenset({_identity(os.stat(root))}), 0, False)]  # with those above, links, hidden
    while folders:
        folder, above, links, in_hidden = folders.pop()
        for entry in _entries(folder, left_out):
            hidden = in_hidden or entry.name.startswith(".") or entry.name in METADATA
            if not _is_folder(entry):
                if (fault := _fault(entry, hidden)) is not None:
                    (left_out.setdefault(fault, []) if fault else found).append(entry.path)
            elif (identity := _identity(entry.stat())) in above or links + entry.is_symlink() > MAX_LINKS:
                left_out.setdefault(LOOP, []).append(entry.path)
            else:
                folders.append((entry.path, above | {identity}, links + entry.is_symlink(), hidden))
    return sorted(found), {reason: sorted(paths) for reason, paths in left_out.items()}


def _entries(folder: str, left_out: LeftOut) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        left_out.setdefault(f"a folder that cannot be read: {error.strerror}", []).append(folder)
        return []


def _fault(entry: os.DirEntry[str], hidden: bool) -> str | None:
    """Say why an entry that is no folder is left out; empty: it is not, None: it is no image."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in OTHER:
        return None
    regular = _is_regular(entry)
    if suffix not in SUFFIXES | FOREIGN and not (regular and not hidden and _begins_as_image(entry.path)):
        return None
    if hidden:
        return HIDDEN
    if not regular:
        return IRREGULAR
    if suffix in FOREIGN:
        return f"a format that is not read ({suffix}): convert it to JPEG or PNG"
    return "" if suffix in SUFFIXES else MISNAMED


def _begins_as_image(path: str) -> bool:
    try:
        with open_file(path) as file:
            start = file.read(12)
            return start.startswith(SIGNATURES) or (start[:4], start[8:]) == (b"RIFF", b"WEBP")
    except OSError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_regular(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def find_images(path: Path) -> tuple[Record, ...]:
    """Return one image, or all in a folder and the folders inside it, sorted; person and camera are unknown."""
    paths = [str(path.absolute())] if path.is_file() else find_files(path.absolute())[0] if path.is_dir() else []
    if not paths:
        raise DataError(f"{printable(path)} holds no images; name an image, or a folder with some in it or below it")
    return tuple(Record(image, -1, -1) for image in paths)


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
