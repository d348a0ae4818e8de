"""Decoded training images that stay: one file beside the data set, mapped into memory or copied to the GPU whole."""

import fcntl
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dataloading.records import DataError, shown

DEVICE_SHARE, HOST_SHARE = 0.25, 0.5  # of the memory now free: activations, workers and other users need the rest
Place = Literal["device", "host", "none"]


class ResidentPixels:
    """Batches of images in memory; without workers, and nothing is decoded.

    On the device all N images take N x H x W x 3 bytes: 1.3 GB for 12,936 images at 256 x 128. On the host they are
    pages of the file, which all processes share and the system may drop; a batch goes to a GPU through pinned memory.
    """

    def __init__(self, images: Tensor, place: Place, device: torch.device) -> None:
        self._images: Tensor | None = images.to(device) if place == "device" else images
        self._stays = place == "device" or device.type == "cpu"  # where it is augmented: no batch is gathered

    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """For each batch of positions all images and those rows of them; or its images, pinned on their way."""
        if self._images is None:
            raise RuntimeError("the loader is closed")
        rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *batches])).to(self._images.device)
        for part in rows.split([len(batch) for batch in batches]):
            if self._stays:
                yield self._images, part
            else:  # the allocator waits for the copy to the device before it gives this out again
                pinned = torch.empty((len(part), *self._images.shape[1:]), dtype=torch.uint8, pin_memory=True)
                yield torch.index_select(self._images, 0, part, out=pinned), None

    def close(self) -> None:
        self._images = None


def place_for(num_bytes: int, device: torch.device) -> Place:
    """Where so many bytes of images may stay: device before host, with room left for all else."""
    if device.type == "cuda" and num_bytes <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "host" if num_bytes <= HOST_SHARE * free_host_memory() else "none"


def free_host_memory() -> int:
    """Bytes that can be used without swapping; where the system does not tell, a quarter of all."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def load_or_fill(
    file: Path, root: str, paths: Sequence[str], size: tuple[int, int], how: str, fill: Callable[[], Iterator[Tensor]]
) -> Tensor:
    """(N, H, W, 3) uint8 mapped from `file`, in the order of `paths`; read-only by agreement.

    Where the file is missing, damaged, or of other images, one process of all that ask fills it from `fill`, batches
    in order, while the others wait. `how` says what besides the files decides the pixels. OSError: no writing there.
    """
    digest = digest_of(root, paths, f"{how} {size[0]} x {size[1]}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # free again as soon as its owner has ended, however
        images = _map(file, digest)
        if images is None:
            _write(file, (len(paths), *size, 3), digest, fill())
            images = _map(file, digest)
    if images is None:
        raise OSError(f"{shown(file)} has been overwritten or does not hold what was written")
    return images


def digest_of(root: str, paths: Sequence[str], how: str) -> str:
    """Of the names under `root`, sizes and times of all files in order, without opening them."""
    digest = hashlib.blake2b(how.encode(), digest_size=16)
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"cannot read the image {shown(path)}: {error.strerror}") from error
        name = os.fsencode(os.path.relpath(path, root))
        digest.update(b"%b\0%d %d\n" % (name, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


def _map(file: Path, digest: str) -> Tensor | None:
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("digest") == digest:
                images: Tensor = opened.get_tensor("images")
                return images
    except (OSError, SafetensorError):  # none there, or not whole
        pass
    return None


def _write(file: Path, shape: tuple[int, ...], digest: str, batches: Iterator[Tensor]) -> None:
    """A safetensors file written as the batches come; under its name only once it is whole."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    num_bytes = int(np.prod(shape))
    entry = {"dtype": "U8", "shape": shape, "data_offsets": (0, num_bytes)}
    header = json.dumps({"__metadata__": {"digest": digest}, "images": entry}).encode()
    header += b" " * (-len(header) % 8)
    if num_bytes > shutil.disk_usage(file.parent).free:
        raise OSError(f"{shown(file.parent)} has no room for {num_bytes * 1e-9:.1f} GB of decoded images")
    partial = file.with_suffix(".partial")
    try:
        with open(partial, "wb") as out, tqdm(desc="decoding", total=shape[0], unit=" images", disable=None) as bar:
            out.write(struct.pack("<Q", len(header)) + header)
            for pixels in batches:
                out.write(pixels.cpu().numpy().data)
                bar.update(len(pixels))
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
