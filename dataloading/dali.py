"""Files decoded and resized by DALI: JPEGs on the GPU, or by the same graph on a CPU.

The graph is deterministic: file names go in, resized pixels come out. What varies from epoch to epoch follows from the
plan, so that all backends train on the same samples. `fusionreid.kernels.augment` does it; or the graph, all but the
noise of erased rectangles, with flips and shifts as inputs beside the names.
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

from fusionreid.dataloading.decode import Filter
from fusionreid.dataloading.shared_memory import BATCHES_AHEAD
from fusionreid.kernels import augment

FILTERS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
Inputs = tuple[np.ndarray, ...]  # of a batch: positions; where the graph augments, also flip (B,) and shift (B, 2)
Normalize = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of red, green, blue
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
        normalize: Normalize | None = None,
    ) -> None:
        """With `normalize`, the mean and deviation of a channel, the graph augments too: call `augmented`."""
        self._device, self._fallback, self._normalize = device, fallback, normalize
        self._waiting: deque[Inputs] = deque()  # batches that DALI has not taken yet
        self._pipeline: Pipeline | None = _graph(
            _source(paths, self._waiting),
            "mixed" if device.type == "cuda" else "cpu",
            size,
            FILTERS[resize],
            normalize,
            batch_size=batch_size,
            num_threads=max(1, num_threads),
            device_id=torch.cuda.current_device() if device.type == "cuda" else None,
            prefetch_queue_depth=BATCHES_AHEAD,
        )
        self._pipeline.build()

    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, None]]:
        """Yield (B, H, W, 3) uint8 on the device per batch of positions in `paths`; the next call ends this one."""
        for pixels in self._run([(batch,) for batch in batches]):
            yield pixels, None

    def augmented(self, batches: Sequence[Inputs]) -> Iterator[Tensor]:
        """Yield (B, 3, H, W) float32, channels-last, per batch of positions, flip (B,) bool and shift (B, 2).

        That is what `fusionreid.kernels.augment` makes of them where nothing is erased.
        """
        for pixels in self._run(batches):
            yield pixels.permute(0, 3, 1, 2).clone()  # DALI writes its own memory again

    def _run(self, batches: Sequence[Inputs]) -> Iterator[Tensor]:
        if self._pipeline is None:
            raise RuntimeError("the loader is closed")
        self._waiting.clear()
        for _ in range(BATCHES_AHEAD + 1):  # what an epoch left in the middle had under way, then the end
            with suppress(RuntimeError, StopIteration):
                self._pipeline.run()
        self._pipeline.reset()
        self._waiting.extend(batches)
        for batch in batches:
            yield self._decoded(batch)

    def _decoded(self, batch: Inputs) -> Tensor:
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
            some = tuple(values[odd] for values in batch)
            pixels[torch.from_numpy(odd).to(self._device)] = self._by_fallback(some)
        return pixels

    def _by_fallback(self, batch: Inputs) -> Tensor:
        positions, *parameters = batch
        images = self._fallback(positions.tolist()).to(self._device)
        if self._normalize is None:
            return images
        flip, shift = (torch.from_numpy(values).to(self._device) for values in parameters)
        nothing = torch.zeros(len(images), 4, dtype=torch.int64, device=self._device)
        mean, std = self._normalize
        augmented = augment(images, flip, shift, nothing, nothing[:, 0], seed=0, epoch=0, mean=mean, std=std)
        return augmented.permute(0, 2, 3, 1)

    def close(self) -> None:
        """Free the pipeline; a later call raises RuntimeError."""
        self._pipeline = None


def _source(paths: Sequence[str], waiting: deque[Inputs]) -> Callable[[], tuple[np.ndarray, ...]]:
    """Return the callback that gives DALI a batch.

    File names in rows of one length, filled up with zeros, then, where the graph augments, what its crop starts at and
    whether it is mirrored.
    """
    names = [os.fsencode(path) for path in paths]
    length = max(map(len, names), default=0) + 1
    table = np.frombuffer(b"".join(name.ljust(length, b"\0") for name in names), np.uint8).reshape(-1, length)

    def next_batch() -> tuple[np.ndarray, ...]:
        if not waiting:
            raise StopIteration
        positions, *parameters = waiting.popleft()
        if not parameters:
            return (table[positions],)
        flip, shift = parameters
        start = np.where(flip[:, None], shift * [1, -1], shift)  # it is the crop that is mirrored
        return table[positions], start.astype(np.int32), flip.astype(np.int32)

    return next_batch


@pipeline_def
def _graph(
    source: Callable[[], tuple[np.ndarray, ...]],
    decoder: str,
    size: tuple[int, int],
    interpolation: int,
    normalize: Normalize | None,
) -> Any:
    """Compute resized pixels, never turned by EXIF, and the first four bytes of each file.

    One axis after the other, as Pillow does it: what overshoots an edge is cut to 0..255 in between. Both at once
    differ from it by up to 10 grey levels, these by 2 (mean 0.2 and 0.02; bicubic, 128 x 64 to 256 x 128).
    """
    inputs = fn.external_source(
        source=source,
        num_outputs=1 if normalize is None else 3,
        dtype=[types.UINT8, types.INT32, types.INT32][: 1 if normalize is None else 3],
        ndim=[1, 1, 0][: 1 if normalize is None else 3],
        batch=True,
    )
    files = fn.io.file.read(inputs[0])
    images = fn.decoders.image(
        files, device=decoder, output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
    )
    resize = partial(fn.resize, mode="stretch", interp_type=interpolation, antialias=True)
    pixels = resize(resize(images, resize_x=size[1]), resize_y=size[0])
    if normalize is not None:
        _, start, mirror = inputs
        shifted = fn.slice(pixels, start=start, shape=size, axes=(0, 1), out_of_bounds_policy="pad", fill_values=0)
        mean, std = ([255 * value for value in values] for values in normalize)
        pixels = fn.crop_mirror_normalize(
            shifted, mirror=mirror, mean=mean, std=std, dtype=types.FLOAT, output_layout="HWC"
        )
    return pixels, fn.slice(files, start=0, end=len(SIGNATURE) + 1, axes=[0])
