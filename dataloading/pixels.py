"""Where pixels come from: files that processes or DALI decode, or images that are resident in memory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dataloading.cache import Place, ResidentPixels, load_or_fill, place_for
from dataloading.config import DataloaderConfig
from dataloading.decode import Filter
from dataloading.index import index_folder
from dataloading.records import DataError, shown
from dataloading.worker import FilePixels

JPEG_SHARE = 0.99  # of the files have a JPEG's name where DALI is worth its while: it hands the others back
Backend = Literal["dali", "torchvision"]

log = logging.getLogger(__name__)


class Pixels(Protocol):
    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Images (N, H, W, 3) uint8, and which of them each batch of positions is, (B,) int64; None: all, in order.

        Good until the next; a new call ends the one before.
        """

    def close(self) -> None:
        """End all processes and free the memory; a call then raises."""


def from_files(
    paths: Sequence[str],
    size: tuple[int, int],
    resize: Filter,
    cfg: DataloaderConfig,
    *,
    batch_size: int,
    device: torch.device,
    otherwise: Callable[[Sequence[int]], Tensor],
) -> Pixels:
    """Files decoded whenever they are asked for; `otherwise` reads a batch with a file that cannot be read."""
    if backend(cfg, paths, device) == "torchvision":
        return FilePixels(paths, size, resize, cfg.NUM_WORKERS, otherwise=otherwise, pin=device.type == "cuda")
    from dataloading.dali import DaliPixels  # installed only where it is wanted

    return DaliPixels(
        paths, size, resize,
        batch_size=batch_size, num_threads=cfg.NUM_WORKERS, device=device, otherwise=otherwise,
    )  # fmt: skip


def backend(cfg: DataloaderConfig, paths: Sequence[str], device: torch.device) -> Backend:
    """What decodes. DALI wins where it decodes on the GPU; on a CPU torchvision is twice as fast."""
    if cfg.BACKEND == "torchvision" or (cfg.BACKEND == "auto" and device.type != "cuda"):
        return "torchvision"
    jpegs = sum(path.lower().endswith((".jpg", ".jpeg")) for path in paths)
    if cfg.BACKEND == "auto" and jpegs < JPEG_SHARE * len(paths):
        return "torchvision"
    try:
        import dataloading.dali  # noqa: F401
    except (ImportError, OSError) as error:
        remedy = "pip install nvidia-dali-cuda130, or set DATALOADER.BACKEND torchvision"
        if cfg.BACKEND == "dali":
            raise DataError(f"DATALOADER.BACKEND dali: DALI cannot be used: {error}; {remedy}") from error
        log.warning("DALI cannot be used, processes decode on the CPU: %s; %s", error, remedy)
        return "torchvision"
    return "dali"


def for_training(
    paths: Sequence[str],
    size: tuple[int, int],
    resize: Filter,
    cfg: DataloaderConfig,
    *,
    root: str,
    batch_size: int,
    device: torch.device,
    otherwise: Callable[[Sequence[int]], Tensor],
) -> tuple[Pixels, str]:
    """Resident images where DATALOADER.CACHE and the room allow, else files; and a line that says which, with sizes."""
    num_bytes = len(paths) * size[0] * size[1] * 3
    place: Place = place_for(num_bytes, device) if cfg.CACHE == "auto" else cfg.CACHE
    if place == "device" and device.type != "cuda":
        raise DataError("DATALOADER.CACHE device needs a GPU; set host, or auto")
    how = f"{backend(cfg, paths, device)} {resize}"
    file = index_folder(root) / f".fusionreid-train-{size[0]}x{size[1]}-{how.replace(' ', '-')}.safetensors"

    def files() -> Pixels:
        return from_files(paths, size, resize, cfg, batch_size=batch_size, device=device, otherwise=otherwise)

    def fill() -> Iterator[Tensor]:
        pixels = files()
        try:
            for images, _ in pixels(np.split(np.arange(len(paths)), range(batch_size, len(paths), batch_size))):
                yield images
        finally:
            pixels.close()

    what = f"{len(paths):,} training images of {size[0]} x {size[1]}, {num_bytes * 1e-6:,.0f} MB decoded"
    if place != "none":
        try:
            images = load_or_fill(file, root, paths, size, how, fill)
            return ResidentPixels(images, place, device), f"{what}: resident in {place} memory, from {shown(file)}"
        except OSError as error:
            if cfg.CACHE != "auto":
                remedy = "set none to decode every image anew"
                raise DataError(f"DATALOADER.CACHE {cfg.CACHE}: {error}; {remedy}") from error
            log.warning("%s; every image is decoded anew", error)
    return files(), f"{what}: decoded anew by {how.split()[0]} in every epoch"
