"""Cache of decoded images: one file beside the data set, mapped into memory or copied to the GPU."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusionreid.dataloading.records import printable
from fusionreid.files import atomic_write, locked, remove_drafts

DEVICE_SHARE, HOST_SHARE = 0.25, 0.5  # of the memory now free: activations, workers and other users need the rest
Place = Literal["device", "host", "none"]
Filling = Iterator[tuple[Sequence[int], Tensor]]  # of batches in order: the images that are printable, and pixels
Fill = Callable[[], Filling]


class CachedImages:
    """Image source that takes batches from memory: no workers, no decoding.

    On the device all N images take N x H x W x 3 bytes: 1.3 GB for 12,936 images at 256 x 128. On the host they are
    pages of the file, which all processes share and the system may drop; a batch goes to a GPU through pinned memory.
    """

    def __init__(self, images: Tensor, place: Place, device: torch.device, first: int = 0) -> None:
        """Take images whose first one stands at position `first` of the data set's part."""
        self._images: Tensor | None = images.to(device) if place == "device" else images
        self._first = first
        self._augmented_in_place = place == "device" or device.type == "cpu"

    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield per batch of positions all images and the batch's rows, or its images in pinned memory and None."""
        if self._images is None:
            raise RuntimeError("the loader is closed")
        rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *batches]) - self._first).to(self._images.device)
        for part in rows.split([len(batch) for batch in batches]):
            if self._augmented_in_place:  # the augmentation gathers the rows
                yield self._images, part
            else:  # the allocator waits for the copy to the device before it gives this out again
                pinned = torch.empty((len(part), *self._images.shape[1:]), dtype=torch.uint8, pin_memory=True)
                yield torch.index_select(self._images, 0, part, out=pinned), None

    def close(self) -> None:
        """Free the images; a later call raises RuntimeError."""
        self._images = None


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
) -> Tensor | None:
    """Map the images (N, H, W, 3) uint8 from `file`, in the order of `paths`; never write to them.

    Where the file is missing, damaged, or of other images, one of all processes that ask fills it, while the others
    wait; without `fill` the file is left as it is and the result is None. `how` says what besides the files decides
    the pixels. OSError: the file cannot be written.
    """
    what, marks = f"{how} {size[0]} x {size[1]}", [_mark(root, path) for path in paths]
    digest = _digest(what, marks)
    if (images := _map(file, digest)) is not None or fill is None:
        return images
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_suffix(".lock")):
        images = _map(file, digest)
        if images is None:
            images = _map(file, _write(file, (len(paths), *size, 3), what, marks, fill()))
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


def _map(file: Path, digest: str) -> Tensor | None:
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("digest") == digest:
                images: Tensor = opened.get_tensor("images")
                return images
    except (OSError, SafetensorError):  # none there, or not whole
        pass
    return None


def _write(file: Path, shape: tuple[int, ...], what: str, marks: Sequence[bytes], batches: Filling) -> str:
    """Write a safetensors file batch by batch, visible once it is whole, and return its digest."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    num_bytes = int(np.prod(shape))
    header = _header(shape, num_bytes, "0" * len(_digest(what, [])))
    if num_bytes > shutil.disk_usage(file.parent).free:
        raise OSError(f"{printable(file.parent)} has no room for {num_bytes * 1e-9:.1f} GB of decoded images")
    remove_drafts(file)
    held: list[bytes] = []
    with atomic_write(file) as out, tqdm(desc="decoding", total=shape[0], unit=" images", disable=None) as bar:
        out.write(header)
        for positions, pixels in batches:
            out.write(pixels.cpu().numpy().data)
            held += [marks[position] for position in positions]
            bar.update(len(pixels))
        out.seek(0)
        out.write(_header(shape, num_bytes, digest := _digest(what, held)))
    return digest


def _header(shape: tuple[int, ...], num_bytes: int, digest: str) -> bytes:
    entry = {"dtype": "U8", "shape": shape, "data_offsets": (0, num_bytes)}
    header = json.dumps({"__metadata__": {"digest": digest}, "images": entry}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header
