"""Files decoded and resized by DALI: JPEGs on the GPU, or by the same graph on a CPU.

The graph is deterministic: file names go in, resized pixels come out. `fusionreid.kernels.augment` does what varies
from epoch to epoch, for every backend alike, so that all train on the same samples.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from torch import Tensor

from fusionreid.dataloading.decode import BATCHES_AHEAD, Filter

FILTERS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
SIGNATURE = np.frombuffer(b"\xff\xd8\xff", np.uint8)  # of a JPEG; its fourth byte names the first segment,
ADOBE = 0xEE  # which in CMYK is this one


class DaliDecoder:
    """Image source by DALI. `fallback` decodes files that are no JPEG, CMYK ones, and batches that DALI refuses.

    Memory: the pixels of BATCHES_AHEAD + 1 batches, 12.6 MB per batch of 128 at 256 x 128, and as many images in the
    files' own size; on the GPU what nvJPEG needs for the largest besides. No processes, `num_threads` threads.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: tuple[int, int],
        resize: Filter,
        *,
        batch_size: int,
        num_threads: int,
        device: torch.device,
        fallback: Callable[[Sequence[int]], Tensor],
    ) -> None:
        self._device, self._fallback = device, fallback
        self._waiting: deque[np.ndarray] = deque()  # batches that DALI has not taken yet
        self._pipeline: Pipeline | None = _graph(
            _source(paths, self._waiting),
            "mixed" if device.type == "cuda" else "cpu",
            size,
            FILTERS[resize],
            batch_size=batch_size,
            num_threads=max(1, num_threads),
            device_id=torch.cuda.current_device() if device.type == "cuda" else None,
            prefetch_queue_depth=BATCHES_AHEAD,
        )
        self._pipeline.build()

    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, None]]:
        """Yield (B, H, W, 3) uint8 on the device per batch of positions in `paths`; the next call ends this one."""
        if self._pipeline is None:
            raise RuntimeError("the loader is closed")
        self._waiting.clear()
        for _ in range(BATCHES_AHEAD + 1):  # what an epoch left in the middle had under way, then the end
            with suppress(RuntimeError, StopIteration):
                self._pipeline.run()
        self._pipeline.reset()
        self._waiting.extend(batches)
        for batch in batches:
            yield self._decoded(batch), None

    def _decoded(self, batch: np.ndarray) -> Tensor:
        """Take the next batch from the pipeline; on a GPU its memory belongs to the current stream, as must its use."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        assert self._pipeline is not None
        try:
            images, starts = self._pipeline.run(stream)
        except RuntimeError:  # without a name; the other decoder reads the file, or names it
            return self._by_fallback(batch)
        pixels: Tensor = torch.from_dlpack(images.as_tensor())
        start = np.asarray(starts.as_tensor())
        odd = (start[:, :3] != SIGNATURE).any(1) | (start[:, 3] == ADOBE)
        if odd.any():
            pixels[torch.from_numpy(odd).to(self._device)] = self._by_fallback(batch[odd])
        return pixels

    def _by_fallback(self, batch: np.ndarray) -> Tensor:
        return self._fallback(batch.tolist()).to(self._device)

    def close(self) -> None:
        """Free the pipeline; a later call raises RuntimeError."""
        self._pipeline = None


def _source(paths: Sequence[str], waiting: deque[np.ndarray]) -> Callable[[], np.ndarray]:
    """Return the callback that gives DALI a batch of file names: rows of one length, filled up with zeros."""
    names = [os.fsencode(path) for path in paths]
    length = max(map(len, names), default=0) + 1
    table = np.frombuffer(b"".join(name.ljust(length, b"\0") for name in names), np.uint8).reshape(-1, length)

    def names_of_a_batch() -> np.ndarray:
        if not waiting:
            raise StopIteration
        return table[waiting.popleft()]

    return names_of_a_batch


@pipeline_def
def _graph(source: Callable[[], np.ndarray], decoder: str, size: tuple[int, int], interpolation: int) -> Any:
    """Compute resized pixels, never turned by EXIF, and the first four bytes of each file.

    One axis after the other, as Pillow does it: what overshoots an edge is cut to 0..255 in between. Both at once
    differ from it by up to 10 grey levels, these by 2 (mean 0.2 and 0.02; bicubic, 128 x 64 to 256 x 128).
    """
    files = fn.io.file.read(fn.external_source(source=source, dtype=types.UINT8, ndim=1, batch=True))
    images = fn.decoders.image(
        files, device=decoder, output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
    )
    resize = partial(fn.resize, mode="stretch", interp_type=interpolation, antialias=True)
    resized = resize(resize(images, resize_x=size[1]), resize_y=size[0])
    return resized, fn.slice(files, start=0, end=len(SIGNATURE) + 1, axes=[0])
