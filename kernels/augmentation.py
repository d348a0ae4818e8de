"""Augmentation of a batch: flip, shift with a black border, normalise, erase a rectangle with per-pixel noise.

    out[b, :, y, x] = (images[rows[b], y + dy, x' + dx] / 255 - mean) / std,  x' mirrored where flip[b], 0 outside
    out[b, :, y, x] = noise  in the rectangle erase[b] = (top, left, height, width)

Source: He et al., Bag of tricks and a strong baseline for person re-identification, arXiv:1903.07071; erasing:
Zhong et al., arXiv:1708.04896. B of N images, H W pixels; the parameters come from the sampling plan.
"""

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import isfinite, prod

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fusionreid.kernels._path import on_device_of, use_triton
from fusionreid.kernels.noise import Noise, key_of, noise

# Of a program of the kernel: rows, values of a row (three per pixel), warps; a thread draws one block of noise.
ROWS, COLS, NUM_WARPS = 32, 128, 4
# On a CPU, memory of large batches that are gone, for those to come: to clear new pages takes the system longer than
# the augmentation (160 of 220 us an image; one core, B = 128, 256 x 128, fp32).
LARGE = 1 << 20  # bytes
SPARE: deque[np.ndarray] = deque(maxlen=2)


def augment(
    images: Tensor,
    flip: Tensor,
    shift: Tensor,
    erase: Tensor,
    index: Tensor,
    *,
    seed: int,
    epoch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    rows: Tensor | None = None,
) -> Tensor:
    """(N, H, W, 3) uint8 -> (B, 3, H, W) `dtype`, channels-last.

    flip (B,) bool; shift (B, 2) = (dy, dx) in pixels; erase (B, 4), height 0: none; index (B,) position in the epoch;
    rows (B,) which of the images, by default all in order; on a GPU one that does not exist comes out as NaN. Raises
    ValueError where a shape, dtype, device or number is wrong.
    """
    _check(images, flip, shift, erase, index, rows, dtype)
    key, line = key_of(seed, epoch), _line(mean, std)
    shape = (len(flip), *images.shape[1:])
    if use_triton(images) and dtype != torch.float64:
        out = torch.empty(shape, dtype=dtype, device=images.device)
        with on_device_of(images):
            _on_gpu(out, images, rows, flip, shift, erase, index, key, line)
    else:
        out = _room(shape, torch.promote_types(dtype, torch.float32))
        with _one_thread():
            _on_cpu(out, images.cpu(), rows, flip, shift, erase, index, key, line)
        out = out.to(images.device, dtype)
    return out.permute(0, 3, 1, 2)


def erase_rectangles(images: Tensor, erase: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Put the noise of `augment` into images that are augmented but for it, in place.

    images (B, 3, H, W) floating, channels-last; erase (B, 4), height 0: none; index (B,) position in the epoch.
    """
    is_image = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
    if not is_image or not images.permute(0, 2, 3, 1).is_contiguous():
        raise ValueError(
            "erase_rectangles: images must be floating (B, 3, H, W), channels-last, "
            f"got {tuple(images.shape)} {images.dtype} with strides {images.stride()}"
        )
    _check_parameters(len(images), images.device, erase=(erase, 4), index=(index, None))
    key, pixels = key_of(seed, epoch), images.permute(0, 2, 3, 1)
    if use_triton(images):
        batch, height, width, _ = pixels.shape
        if images.numel():
            with on_device_of(images):
                _erase[(triton.cdiv(3 * width, COLS), triton.cdiv(height, ROWS), batch)](
                    erase.contiguous(), index.contiguous(), pixels, key - (key >> 63 << 64), H=height, W=width,
                    ROWS=ROWS, COLS=COLS, num_warps=NUM_WARPS,
                )  # fmt: skip
    else:
        _erase_on_cpu(pixels.flatten(2), erase, index, key)
    return images


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, H, W, 3) uint8 -> (image / 255 - mean) / std, (B, 3, H, W) `dtype`, channels-last; fp32 or wider inside."""
    nothing = torch.zeros(len(images), 4, dtype=torch.int64, device=images.device)
    flip, shift, index = nothing[:, 0].bool(), nothing[:, :2], nothing[:, 0]
    return augment(images, flip, shift, nothing, index, seed=0, epoch=0, mean=mean, std=std, dtype=dtype)


def _line(mean: Sequence[float], std: Sequence[float]) -> list[float]:
    """Three factors and three summands that make a normalised value of a byte."""
    if len(mean) != 3 or len(std) != 3 or not all(map(isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(
            f"augment: mean and std must be three numbers each, all of them finite, std above 0, got {mean} and {std}"
        )
    return [1 / (255 * s) for s in std] + [-m / s for m, s in zip(mean, std)]


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor. The memory of a large one is spare again once nothing refers to it any more."""
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    with suppress(IndexError):
        memory = SPARE.pop()
        if memory.nbytes == num_bytes:
            return _lent(memory).view(dtype).view(shape)
    return _lent(np.empty(num_bytes, np.uint8)).view(dtype).view(shape)


def _lent(memory: np.ndarray) -> Tensor:
    view = memory[:]  # held by the tensor's storage, and by nothing else
    weakref.finalize(view, SPARE.append, memory).atexit = False
    return torch.from_numpy(view)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch would cut up each image for all its threads, and wait for those whose core is busy decoding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _on_gpu(
    out: Tensor, images: Tensor, rows: Tensor | None, flip: Tensor, shift: Tensor, erase: Tensor, index: Tensor,
    key: int, line: Sequence[float],
) -> None:  # fmt: skip
    batch, height, width, _ = out.shape
    if out.numel():
        _augment[(triton.cdiv(3 * width, COLS), triton.cdiv(height, ROWS), batch)](
            images.contiguous(), None if rows is None else rows.contiguous(), flip.contiguous().view(torch.uint8),
            shift.contiguous(), erase.contiguous(), index.contiguous(), out, len(images),
            key - (key >> 63 << 64), *line,  # as a signed number of 64 bits
            H=height, W=width, ROWS=ROWS, COLS=COLS, num_warps=NUM_WARPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])  # the last batch of an epoch is smaller
def _augment(
    images_ptr, rows_ptr, flip_ptr, shift_ptr, erase_ptr, index_ptr, out_ptr, N, key, scale_0, scale_1, scale_2,
    offset_0, offset_1, offset_2, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLS values of an image; what depends on the column alone is computed once for all rows of a thread."""
    image = tl.program_id(2).to(tl.int64)
    source = image if rows_ptr is None else tl.load(rows_ptr + image)
    first_y, first_v = tl.program_id(1) * ROWS, tl.program_id(0) * COLS
    y = first_y + tl.arange(0, ROWS)[:, None]
    v = first_v + tl.arange(0, COLS)[None, :]  # 3 x + channel
    channel = v % 3
    dy, dx = tl.load(shift_ptr + 2 * image).to(tl.int32), tl.load(shift_ptr + 2 * image + 1).to(tl.int32)
    from_y, from_v = y + dy, v + 3 * dx
    from_v = tl.where(tl.load(flip_ptr + image) != 0, 3 * (W - 1) - from_v + 2 * channel, from_v)
    exists = (source >= 0) & (source < N)
    seen = exists & (from_y >= 0) & (from_y < H) & (from_v >= 0) & (from_v < 3 * W)
    column_ptr = images_ptr + (source * H + dy) * (3 * W) + from_v  # of row 0 of the batch's image
    byte = tl.load(column_ptr + y * (3 * W), mask=seen, other=0)
    scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
    offset = tl.where(channel == 0, offset_0, tl.where(channel == 1, offset_1, offset_2))
    value = byte.to(tl.int32).to(tl.float32) * scale + offset  # [ROWS, COLS]

    inside, crossed = _rectangle(erase_ptr + 4 * image, y, v, first_y, first_v, ROWS, COLS)
    if crossed:
        drawn = _drawn(erase_ptr + 4 * image, tl.load(index_ptr + image), key, y, first_v, ROWS, COLS)
        value = tl.where(inside, drawn, value)
    value = tl.where(exists, value, float("nan"))
    out_ptr += image * (3 * H * W) + y * (3 * W) + v
    if H % ROWS or 3 * W % COLS:
        tl.store(out_ptr, value.to(out_ptr.dtype.element_ty), mask=(y < H) & (v < 3 * W))
    else:
        tl.store(out_ptr, value.to(out_ptr.dtype.element_ty))


@triton.jit
def _erase(
    erase_ptr, index_ptr, out_ptr, key, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The tiles of `_augment`, of which only what is inside a rectangle is written."""
    image = tl.program_id(2).to(tl.int64)
    first_y, first_v = tl.program_id(1) * ROWS, tl.program_id(0) * COLS
    y = first_y + tl.arange(0, ROWS)[:, None]
    v = first_v + tl.arange(0, COLS)[None, :]
    inside, crossed = _rectangle(erase_ptr + 4 * image, y, v, first_y, first_v, ROWS, COLS)
    if crossed:
        drawn = _drawn(erase_ptr + 4 * image, tl.load(index_ptr + image), key, y, first_v, ROWS, COLS)
        at = out_ptr + image * (3 * H * W) + y * (3 * W) + v
        tl.store(at, drawn.to(out_ptr.dtype.element_ty), mask=inside & (y < H) & (v < 3 * W))


@triton.jit
def _rectangle(erase_ptr, y, v, first_y, first_v, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which values of a tile lie inside an image's rectangle, and whether any does."""
    top, left = tl.load(erase_ptr).to(tl.int32), 3 * tl.load(erase_ptr + 1).to(tl.int32)
    bottom = top + tl.load(erase_ptr + 2).to(tl.int32)
    right = left + 3 * tl.load(erase_ptr + 3).to(tl.int32)
    rows = tl.maximum(top, first_y) < tl.minimum(bottom, first_y + ROWS)
    columns = tl.maximum(left, first_v) < tl.minimum(right, first_v + COLS)
    return (y >= top) & (y < bottom) & (v >= left) & (v < right), rows & columns


@triton.jit
def _drawn(erase_ptr, index, key, y, first_v, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The noise of a tile that crosses an image's rectangle, [ROWS, COLS]."""
    top, left = tl.load(erase_ptr).to(tl.int32), 3 * tl.load(erase_ptr + 1).to(tl.int32)
    first, last = left // 16, (left + 3 * tl.load(erase_ptr + 3).to(tl.int32) + 15) // 16
    block = first_v // 16 - first + tl.arange(0, COLS // 16)[None, :]
    return noise(key, index, (y - top) * (last - first) + 1, block, ROWS, COLS // 16)


def _on_cpu(
    out: Tensor, images: Tensor, rows: Tensor | None, flip: Tensor, shift: Tensor, erase: Tensor, index: Tensor,
    key: int, line: Sequence[float],
) -> None:  # fmt: skip
    """Image by image, so that what is in between stays in the cache. Views are numpy's, which takes them faster."""
    _, height, width, _ = out.shape
    values = 3 * width
    # One constant per value of a row: the innermost loop then runs over 3 W values, not over 3.
    scale, offset = torch.tensor(line, dtype=out.dtype, device="cpu").view(2, 3).tile(1, width)
    targets, sources, planes = out.flatten(2), images.numpy(), images.permute(0, 3, 1, 2)
    chosen = range(len(out)) if rows is None else rows.tolist()
    if len(chosen) and not 0 <= min(chosen) <= max(chosen) < len(images):
        raise ValueError(f"augment: rows must lie in 0..{len(images) - 1}, got {min(chosen)}..{max(chosen)}")
    for target, row, mirrored, (dy, dx) in zip(targets, chosen, flip.tolist(), shift.tolist()):
        # In planes torch has the mirror vectorised.
        image = planes[row : row + 1].flip(3).permute(0, 2, 3, 1).numpy() if mirrored else sources[row]
        image, pixels = image.reshape(height, values), target.numpy()
        top, bottom, left, right = max(0, -dy), height - max(0, dy), max(0, -3 * dx), values - max(0, 3 * dx)
        if top < bottom and left < right:
            pixels[top:bottom, left:right] = image[top + dy : bottom + dy, left + 3 * dx : right + 3 * dx]
        pixels[:top], pixels[max(0, bottom) :], pixels[:, :left], pixels[:, max(0, right) :] = 0, 0, 0, 0
        torch.addcmul(offset, target, scale, out=target)
    _erase_on_cpu(targets, erase, index, key)


def _erase_on_cpu(targets: Tensor, erase: Tensor, index: Tensor, key: int) -> None:
    """Draw the noise of the rectangles of images (B, H, 3 W), at least float32 inside."""
    noise = Noise(key, torch.promote_types(targets.dtype, torch.float32))
    for pixels, position, (top, left, rows, cols) in zip(targets, index.tolist(), erase.tolist()):
        if rows and cols:
            drawn = torch.from_numpy(noise.rectangle(position, left, rows, cols))
            pixels[top : top + rows, 3 * left : 3 * (left + cols)] = drawn


def _check(
    images: Tensor, flip: Tensor, shift: Tensor, erase: Tensor, index: Tensor, rows: Tensor | None, dtype: torch.dtype
) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"augment: images must be (N, H, W, 3) uint8, got {tuple(images.shape)} {images.dtype}")
    if not dtype.is_floating_point:
        raise ValueError(f"augment: dtype must be floating, got {dtype}")
    batch = len(images if rows is None else rows)
    whole = {} if rows is None else {"rows": (rows, None)}
    _check_parameters(
        batch, images.device, flip=(flip, None), shift=(shift, 2), erase=(erase, 4), index=(index, None), **whole
    )
    if flip.dtype != torch.bool:
        raise ValueError(f"augment: flip must be bool, got {flip.dtype}")


def _check_parameters(batch: int, device: torch.device, **parameters: tuple[Tensor, int | None]) -> None:
    """Each is (batch,) or (batch, columns), of whole numbers, on the device."""
    for name, (tensor, columns) in parameters.items():
        shape = (batch,) if columns is None else (batch, columns)
        if tuple(tensor.shape) != shape or tensor.is_floating_point():
            raise ValueError(f"augment: {name} must be {shape} whole numbers, got {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"augment: {name} is on {tensor.device}, the images are on {device}")
    index, _ = parameters["index"]
    if index.dtype != torch.int64:
        raise ValueError(f"augment: index must be int64, got {index.dtype}")
