"""Sources of pixels: files that worker processes or DALI decode, or images cached in memory."""

import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.cache import CachedImages, Filling, Place, load_or_fill, place_for
from fusionreid.dataloading.config import DataloaderConfig
from fusionreid.dataloading.decode import Filter, decode
from fusionreid.dataloading.decode_workers import DecodeWorkers
from fusionreid.dataloading.fallback_reader import FallbackReader
from fusionreid.dataloading.index import index_folder
from fusionreid.dataloading.records import DataError, Record, printable

if TYPE_CHECKING:
    from fusionreid.dataloading.dali import DaliDecoder

JPEG_SHARE = 0.99  # of the files are JPEGs by name where DALI pays: it hands all others back
Backend = Literal["dali", "torchvision"]

log = logging.getLogger(__name__)


class ImageSource(Protocol):
    """Turns batches of positions into pixels."""

    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield per batch images (N, H, W, 3) uint8 and the rows (B,) int64 that it takes; None: all rows, in order.

        A result is valid until the next one is asked for; a new call ends the one before.
        """

    def close(self) -> None:
        """End all processes and free the memory; a later call raises RuntimeError."""


class ImageSet:
    """The images of one part of a data set at one size, decoded at every use or cached in memory."""

    def __init__(
        self,
        part: Literal["train", "test"],
        records: Sequence[Record],
        size: tuple[int, int],
        resize: Filter,
        cfg: DataloaderConfig,
        *,
        batch_size: int,
        device: torch.device,
        bad_images: BadImages | None = None,
    ) -> None:
        self.part, self.size, self.resize, self.cfg = part, size, resize, cfg
        self.batch_size, self.device = batch_size, device
        self.paths = [record.path for record in records]
        self.reader = FallbackReader(records, partial(decode, size=size, resize=resize), bad_images)

    def from_files(self) -> ImageSource:
        """Return a source that decodes every image at every use."""
        if self._backend() == "torchvision":
            workers, pin = self.cfg.NUM_WORKERS, self.device.type == "cuda"
            return DecodeWorkers(self.paths, self.size, self.resize, workers, fallback=self.reader, pin=pin)
        return self._dali()

    def augmented_by_dali(self, mean: Sequence[float], std: Sequence[float]) -> "DaliDecoder | None":
        """Return a source that also augments, by DATALOADER.AUGMENT dali; None where DALI does not decode."""
        chosen = self.cfg.AUGMENT == "dali" and self._backend() == "dali"
        return self._dali((mean, std)) if chosen else None

    def _backend(self) -> Backend:
        return backend(self.cfg, self.paths, self.device)

    def _dali(self, normalize: tuple[Sequence[float], Sequence[float]] | None = None) -> "DaliDecoder":
        from fusionreid.dataloading.dali import DaliDecoder  # installed only where it is wanted

        return DaliDecoder(
            self.paths,
            self.size,
            self.resize,
            batch_size=self.batch_size,
            num_threads=self.cfg.NUM_WORKERS,
            device=self.device,
            fallback=self.reader,
            normalize=normalize,
        )

    def cached(
        self, root: str, share: slice = slice(None), *, fill: bool = True, prefix: str = ""
    ) -> tuple[CachedImages | None, str]:
        """Return the images of `share` from the cache, or None, and a line that says which, with sizes.

        DATALOADER.CACHE and the free memory decide. The cache file lies in the index folder of `root`, its name begins
        with `prefix`; with `fill` a missing one is written.
        """
        size, cfg = self.size, self.cfg
        num_bytes = len(self.paths) * size[0] * size[1] * 3
        place, how = self._place(num_bytes, share), f"{self._backend()} {self.resize}"
        prefix = prefix or (Path(root).stem if os.path.isfile(root) else "")  # lists may lie side by side
        part = f"{prefix}-{self.part}".lstrip("-")
        name = f".fusionreid-{part}-{size[0]}x{size[1]}-{how.replace(' ', '-')}.safetensors"
        file = index_folder(root) / name
        what = f"{len(self.paths):,} {self.part} images of {size[0]} x {size[1]}, {num_bytes * 1e-6:,.0f} MB decoded"
        images = None
        try:
            if place != "none":
                images = load_or_fill(file, root, self.paths, size, how, self._fill if fill else None)
        except OSError as error:
            if self.part == "train" and cfg.CACHE != "auto":
                remedy = "set none to decode every image at every use"
                raise DataError(f"DATALOADER.CACHE {cfg.CACHE}: {error}; {remedy}") from error
            log.warning("%s; every image is decoded at every use", error)
        if images is None:
            return None, f"{what}: decoded by {how.split()[0]} at every use"
        source = CachedImages(images, share, place, self.device)
        return source, f"{what}: cached in {place} memory, from {printable(file)}"

    def _place(self, num_bytes: int, share: slice) -> Place:
        """Decide where the images stay. Only training images may claim the device's memory."""
        if self.cfg.CACHE == "auto" or (self.cfg.CACHE == "device" and self.part == "test"):
            return place_for(num_bytes, self.device, num_bytes * len(self.paths[share]) // len(self.paths))
        if self.cfg.CACHE == "device" and self.device.type != "cuda":
            raise DataError("DATALOADER.CACHE device needs a GPU; set host, or auto")
        return self.cfg.CACHE

    def _fill(self) -> Filling:
        source = self.from_files()
        batches = np.split(np.arange(len(self.paths)), range(self.batch_size, len(self.paths), self.batch_size))
        try:
            for batch, (images, _) in zip(batches, source(batches)):
                yield [self.reader.replacements.get(i, i) for i in batch.tolist()], images
        finally:
            source.close()


def backend(cfg: DataloaderConfig, paths: Sequence[str], device: torch.device) -> Backend:
    """Choose the decoder. DALI wins where it decodes on the GPU; on a CPU torchvision is twice as fast."""
    if cfg.BACKEND == "torchvision" or (cfg.BACKEND == "auto" and device.type != "cuda"):
        return "torchvision"
    jpegs = sum(path.lower().endswith((".jpg", ".jpeg")) for path in paths)
    if cfg.BACKEND == "auto" and jpegs < JPEG_SHARE * len(paths):
        return "torchvision"
    try:
        import_module("fusionreid.dataloading.dali")
    except (ImportError, OSError) as error:
        remedy = "pip install nvidia-dali-cuda130, or set DATALOADER.BACKEND torchvision"
        if cfg.BACKEND == "dali":
            raise DataError(f"DATALOADER.BACKEND dali: DALI cannot be used: {error}; {remedy}") from error
        log.warning("DALI cannot be used, processes decode on the CPU: %s; %s", error, remedy)
        return "torchvision"
    return "dali"
