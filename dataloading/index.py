"""Index of a data set: what header and end of every image file say, kept beside the data set for the next start."""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from pydantic import TypeAdapter

from fusionreid.dataloading.image_files import open_file, open_image, read_file
from fusionreid.files import atomic_write

FILE = ".fusionreid-index.json"
FORMAT = b"index 2"  # another format: the file is rewritten
CHUNK = 64  # files a thread takes at a time
THREADS, WAITING = 32, 3  # that read headers where that takes so many times its computing
SAVE_FILES, SAVE_S = 20_000, 60  # the index is saved after so many files, then after twice as many, and so often
ORIENTATION = 0x0112  # EXIF tag
SAMPLE = 4096  # bytes at each end that go into the fingerprint
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class Entry(NamedTuple):
    """One file as it was found. It can be used if `fault` is empty, as far as its header and end tell."""

    size: int = -1  # bytes
    modified: int = -1  # ns
    format: str = ""  # JPEG, PNG, ...
    width: int = 0
    height: int = 0
    multi_frame: bool = False  # the first frame is used
    turned: bool = False  # its EXIF data ask for it to be shown turned; it is not
    fingerprint: str = ""  # of size, first and last bytes
    fault: str = ""
    lasting: bool = True  # while size and time stay the same; what a disk says may pass


ENTRIES = TypeAdapter(dict[str, Entry])


def scan(root: str, paths: Iterable[str], decode: Callable[[str], object] | None = None) -> dict[str, Entry]:
    """Return the entry of every path. With `decode`, which raises for a bad file, all files are decoded as well.

    A file whose size and time are those in the index of `root` is not opened again, except to decode it. Of the others
    header and end are read; only those whose end leaves doubt are decoded. The index is saved as it grows, so that a
    scan that is killed goes on where it was. Memory: 1.3 kB per file.
    """
    paths = sorted(set(paths))
    file = index_folder(root) / FILE
    known = _load(file)
    prefix = f"{_folder(root)}{os.sep}"
    names = [path.removeprefix(prefix) for path in paths]  # the data set may move
    Image.init()  # of all formats, before threads do it together
    chunks = [slice(start, start + CHUNK) for start in range(0, len(paths), CHUNK)]

    def entries(chunk: slice) -> list[Entry]:
        return [_entry(path, known.get(name), decode) for path, name in zip(paths[chunk], names[chunk])]

    found: list[Entry] = []
    saved, saved_at, changed = 0, time.monotonic(), False
    try:
        with warnings.catch_warnings(action="ignore"), closing(_in_threads(entries, chunks, bool(decode))) as parts:
            for part in _progress(parts, len(chunks)):  # without warnings of odd metadata
                new = names[len(found) : len(found) + len(part)]
                found += part
                changed |= any(known.get(name) != entry for name, entry in zip(new, part) if entry.lasting)
                if changed and (len(found) >= 2 * saved + SAVE_FILES or time.monotonic() - saved_at > SAVE_S):
                    _save(file, known | _lasting(names, found))
                    saved, saved_at, changed = len(found), time.monotonic(), False
    finally:  # also for whoever is stopped
        if changed:
            _save(file, known | _lasting(names, found))
    return dict(zip(paths, found))


def _lasting(names: Sequence[str], entries: Sequence[Entry]) -> dict[str, Entry]:
    return {name: entry for name, entry in zip(names, entries) if entry.lasting}


def _in_threads(
    work: Callable[[slice], list[Entry]], chunks: Sequence[slice], decode: bool
) -> Generator[list[Entry], None, None]:
    """Yield the results in order. Headers are read by many threads where the first chunk mostly waits for the disk.

    Elsewhere threads would only fight for the interpreter.
    """
    threads = len(os.sched_getaffinity(0)) if decode else 1
    first, rest = chunks[:1], chunks[1:]
    for chunk in first:
        start, cpu_start = time.monotonic(), time.thread_time()
        yield work(chunk)
        elapsed, computing = time.monotonic() - start, time.thread_time() - cpu_start
        if not decode and elapsed > WAITING * computing:
            threads = THREADS
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(work, rest)
    finally:
        pool.shutdown(cancel_futures=True)


def mark_bad(root: str, path: str, fault: str) -> None:
    """Record in the index the fault that decoding found in a file that `scan` let pass."""
    entry = inspect_file(path)
    if not entry.fault:
        file, name = index_folder(root) / FILE, path.removeprefix(f"{_folder(root)}{os.sep}")
        _save(file, _load(file) | {name: entry._replace(fault=fault)})


def index_folder(root: str) -> Path:
    """Return the folder of index and cache: the data set's own, or the user's cache where that cannot be written."""
    folder = _folder(root)
    if os.access(folder, os.W_OK):
        return folder
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "fusionreid", hashlib.blake2b(os.fsencode(root), digest_size=8).hexdigest())


def _folder(root: str) -> Path:
    return Path(root) if os.path.isdir(root) else Path(root).parent  # beside a CSV file


def _entry(path: str, known: Entry | None, decode: Callable[[str], object] | None) -> Entry:
    entry = known if known is not None and not decode and _unchanged(path, known) else inspect_file(path)
    if decode and not entry.fault:
        try:
            decode(path)
        except Exception as error:  # decoders raise whatever a broken file leads them to
            return entry._replace(fault=reason(error))
    return entry


def _unchanged(path: str, entry: Entry) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (entry.size, entry.modified)


def inspect_file(path: str) -> Entry:
    """Read header and end of a file; one whose end leaves doubt is decoded."""
    size = modified = -1
    try:
        with open_file(path) as file:
            status = os.fstat(file.fileno())
            size, modified = status.st_size, status.st_mtime_ns
            start, end = (os.pread(file.fileno(), SAMPLE, at) for at in (0, max(size - SAMPLE, 0)))
            if not start:
                raise ValueError("empty file")
            image = open_image(file)
            multi_frame, turned = _has_frames(image), _is_turned(image)
            width, height = image.size
            if image.format == "JPEG" and -(-width // 8) * -(-height // 8) > 8 * size:  # a block takes a bit at least
                raise ValueError(f"its header says {width} x {height} pixels, more than its {size:,} bytes can hold")
            if not _is_whole(image.format or "", start, end, size):
                image.convert("RGB")
        fingerprint = hashlib.blake2b(b"%d%b%b" % (size, start, end), digest_size=6).hexdigest()
        return Entry(size, modified, image.format or "", width, height, multi_frame, turned, fingerprint)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        lasting = getattr(error, "errno", None) is None and size >= 0
        return Entry(size, modified, fault=reason(error), lasting=lasting)


def reason(error: BaseException) -> str:
    """Say in one line why a file cannot be used."""
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    return text.splitlines()[0]


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a later frame is broken: the first one counts
        return True


def _is_turned(image: Image.Image) -> bool:
    if "exif" not in image.info:
        return False
    try:
        return image.getexif().get(ORIENTATION, 1) not in (0, 1)
    except Exception:  # broken EXIF data, which nothing else reads
        return False


def _is_whole(image_format: str, start: bytes, end: bytes, size: int) -> bool:
    """Tell whether the file surely reaches its end; if not, other formats and trailing bytes need decoding."""
    match image_format:
        case "JPEG" | "MPO":
            return end.endswith(b"\xff\xd9")
        case "PNG":
            return end.endswith(PNG_END)
        case "WEBP":
            return int.from_bytes(start[4:8], "little") + 8 <= size
    return False


def _progress(work: Iterable[list[Entry]], total: int) -> Iterable[list[Entry]]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    options = {"unit": " files", "unit_scale": CHUNK, "delay": 2, "disable": None}  # None: where there is no terminal
    bar: Iterable[list[Entry]] = tqdm(work, "reading image files", total, **options)
    return bar


def _load(file: Path) -> dict[str, Entry]:
    """Read the index; a missing or damaged one is empty."""
    try:
        digest, _, text = read_file(str(file)).partition(b"\n")
        if digest == _digest(text):
            return ENTRIES.validate_json(text)
    except (OSError, ValueError):
        pass
    return {}


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16, person=FORMAT).hexdigest().encode()


def _save(file: Path, entries: dict[str, Entry]) -> None:
    text = json.dumps(entries, separators=(",", ":")).encode()
    with suppress(OSError):  # a full disk: the next start looks again
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as index:
            index.write(_digest(text) + b"\n" + text)
