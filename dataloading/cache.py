"""Cache of decoded images: one file beside the data set, mapped into memory or copied to the GPU."""

import hashlib
import json
import logging
import mmap
import os
import shutil
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fusionreid.dataloading.records import printable
from fusionreid.errors import StorageError
from fusionreid.files import atomic_write, locked, remove_drafts

DEVICE_SHARE, HOST_SHARE = 0.25, 0.5  # of the memory now free: activations, workers and other users need the rest
BLOCK = 1 << 24  # bytes with a digest of their own
NO_DIGEST = "0" * 32
Place = Literal["device", "host", "none"]
Filling = Iterator[tuple[Sequence[int], Tensor]]  # of batches in order: positions of the images they show, pixels
Fill = Callable[[], Filling]

log = logging.getLogger(__name__)


class MappedImages:
    """Images (N, H, W, 3) uint8 in a file that is mapped into memory."""

    def __init__(self, path: Path, opened: int, shape: tuple[int, ...], start: int) -> None:
        """Take over the descriptor of the file `path`, whose images begin at byte `start`."""
        self._path, self._file, self._size = path, os.fdopen(opened, "rb"), start + int(np.prod(shape))
        mapped = mmap.mmap(opened, self._size, access=mmap.ACCESS_COPY)  # writable as torch wants it, never written
        self.images = torch.frombuffer(mapped, dtype=torch.uint8, offset=start).view(shape)

    def check(self) -> None:
        """Raise StorageError if the file has been cut since; reading what is gone would end the process by SIGBUS."""
        if os.fstat(self._file.fileno()).st_size < self._size:
            raise StorageError(
                f"{printable(self._path)}, the decoded images in use, has been cut short: delete it and start again"
            )

    def close(self) -> None:
        """Close the file; the images stay mapped as long as they are referenced."""
        self._file.close()


class CachedImages:
    """Image source that takes batches from memory: no workers, no decoding.

    On the device all N images take N x H x W x 3 bytes: 1.3 GB for 12,936 images at 256 x 128. On the host they are
    pages of the file, which all processes share and the system may drop; a batch goes to a GPU through pinned memory.
    """

    def __init__(self, mapped: MappedImages, share: slice, place: Place, device: torch.device) -> None:
        """Take the images of `share`, which has a start and a stop or is whole."""
        mapped.check()
        images = mapped.images[share]
        self._images: Tensor | None = images.to(device) if place == "device" else images
        self._mapped, self._place, self._first = mapped, place, share.start or 0
        self._augmented_in_place = place == "device" or device.type == "cpu"

    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield per batch of positions all images and the batch's rows, or its images in pinned memory and None."""
        if self._images is None:
            raise RuntimeError("the loader is closed")
        rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *batches]) - self._first).to(self._images.device)
        for part in rows.split([len(batch) for batch in batches]):
            if self._place == "host":
                self._mapped.check()
            if self._augmented_in_place:  # the augmentation gathers the rows
                yield self._images, part
            else:  # the allocator waits for the copy to the device before it gives this out again
                pinned = torch.empty((len(part), *self._images.shape[1:]), dtype=torch.uint8, pin_memory=True)
                yield torch.index_select(self._images, 0, part, out=pinned), None

    def close(self) -> None:
        """Free the images; a later call raises RuntimeError."""
        self._images = None
        self._mapped.close()


def place_for(num_bytes: int, device: torch.device, on_device: int) -> Place:
    """Choose where images are cached: the device, if its share fits, else the host, if all fit."""
    if device.type == "cuda" and on_device <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "host" if num_bytes <= HOST_SHARE * free_host_memory() else "none"


def free_host_memory() -> int:
    """Return the bytes usable without swapping; where the system does not tell, a quarter of all memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def load_or_fill(
    file: Path, root: str, paths: Sequence[str], size: tuple[int, int], how: str, fill: Fill | None
) -> MappedImages | None:
    """Map the images (N, H, W, 3) uint8 from `file`, in the order of `paths`; never write to them.

    Where the file is missing, damaged, or of other images, one of all processes that ask fills it, while the others
    wait; without `fill` the file is left as it is and the result is None. `how` says what besides the files decides
    the pixels. OSError: the file cannot be written.
    """
    what, marks = f"{how} {size[0]} x {size[1]}", [_mark(root, path) for path in paths]
    shape, digest = (len(paths), *size, 3), _digest(what, marks)
    if (images := _map(file, shape, digest)) is not None or fill is None:
        return images
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_suffix(".lock")):
        images = _map(file, shape, digest)
        if images is None:
            images = _map(file, shape, _write(file, shape, what, marks, fill()))
    if images is None:
        raise OSError(f"{printable(file)} has been overwritten or does not hold what was written")
    return images


def _digest(what: str, marks: Iterable[bytes]) -> str:
    """Digest of names, sizes and times of files in order; none is opened."""
    digest = hashlib.blake2b(what.encode(), digest_size=16)
    for mark in marks:
        digest.update(mark)
    return digest.hexdigest()


def _mark(root: str, path: str) -> bytes:
    """Name below `root`, size and time of a file."""
    name = os.fsencode(os.path.relpath(path, root))
    try:
        status = os.stat(path)
    except OSError:  # gone: no file of decoded images has it, so it will be missed when it is read
        return b"%b\0\n" % name
    return b"%b\0%d %d\n" % (name, status.st_size, status.st_mtime_ns)


def _map(file: Path, shape: tuple[int, ...], digest: str) -> MappedImages | None:
    """Map the file if it is the one that `digest` tells and every block of it is as it was written.

    The blocks are read and digested on all cores, which costs 1 s per GB and core and leaves them in the system's
    memory, where the first epoch finds them.
    """
    opened = None
    try:
        opened = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise ValueError("not a regular file")
        num_bytes = int(np.prod(shape))
        expected = len(_header(shape, digest, _blocks(num_bytes) * [NO_DIGEST]))
        header = json.loads(os.pread(opened, expected, 0)[8:])
        blocks = header["__metadata__"]["blocks"].split()
        if header["__metadata__"]["digest"] == digest and os.fstat(opened).st_size == expected + num_bytes:
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                found = list(pool.map(lambda i: _block_digest(opened, expected, num_bytes, i), range(len(blocks))))
            if found == blocks and len(blocks) == _blocks(num_bytes):
                return MappedImages(file, opened, shape, expected)
            log.warning("%s does not hold what was written, and is not used", printable(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # none there, or not whole
        pass
    if opened is not None:
        os.close(opened)
    return None


def _blocks(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK)


def _block_digest(opened: int, start: int, num_bytes: int, block: int) -> str:
    data = os.pread(opened, min(BLOCK, num_bytes - block * BLOCK), start + block * BLOCK)
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _write(file: Path, shape: tuple[int, ...], what: str, marks: Sequence[bytes], batches: Filling) -> str:
    """Write a safetensors file batch by batch, visible once it is whole, and return its digest."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    num_bytes = int(np.prod(shape))
    header = _header(shape, NO_DIGEST, _blocks(num_bytes) * [NO_DIGEST])
    if num_bytes > shutil.disk_usage(file.parent).free:
        raise OSError(f"{printable(file.parent)} has no room for {num_bytes * 1e-9:.1f} GB of decoded images")
    remove_drafts(file)
    held: list[bytes] = []
    blocks, waiting = [], bytearray()
    with atomic_write(file) as out, tqdm(desc="decoding", total=shape[0], unit=" images", disable=None) as bar:
        out.write(header)
        for positions, pixels in batches:
            data = pixels.cpu().contiguous().numpy().data
            out.write(data)
            waiting += data.cast("B")
            while len(waiting) >= BLOCK:
                blocks.append(hashlib.blake2b(waiting[:BLOCK], digest_size=16).hexdigest())
                del waiting[:BLOCK]
            held += [marks[position] for position in positions]
            bar.update(len(pixels))
        blocks += [hashlib.blake2b(waiting, digest_size=16).hexdigest()] if waiting else []
        out.seek(0)
        out.write(_header(shape, digest := _digest(what, held), blocks))
    return digest


def _header(shape: tuple[int, ...], digest: str, blocks: Sequence[str]) -> bytes:
    entry = {"dtype": "U8", "shape": shape, "data_offsets": (0, int(np.prod(shape)))}
    metadata = {"digest": digest, "blocks": " ".join(blocks)}
    header = json.dumps({"__metadata__": metadata, "images": entry}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header
