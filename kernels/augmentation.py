"""Augmentation of a batch: flip, shift with a black border, normalise, erase a rectangle with per-pixel noise.

    out[b, :, y, x] = (in[b, y + dy, x' + dx] / 255 - mean) / std,  x' mirrored where flip[b], 0 outside the image
    out[b, c, y, x] = normal_c(seed, epoch, index[b], y * W + x)  in the rectangle erase[b] = (top, left, height, width)

Source: He et al., Bag of tricks and a strong baseline for person re-identification, arXiv:1903.07071; erasing:
Zhong et al., arXiv:1708.04896. B images, H W pixels; the parameters come from the sampling plan, noise from Philox.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._path import use_triton
from kernels.philox import ERASING_NOISE, WORD, normal, philox

# On a CPU the work goes in parts whose temporaries stay in the cache: 4x (one core, B = 128, 256x128).
IMAGES_PER_PART = 8
PIXELS_PER_PART = 1 << 15
VALUES = 2048  # per program of the kernel


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
) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) `dtype`, channels-last.

    flip (B,) bool; shift (B, 2) = (dy, dx) in pixels; erase (B, 4), height 0: none; index (B,) position in the epoch.
    """
    _check(images, flip, shift, erase, index)
    if use_triton(images) and dtype != torch.float64:
        return _on_gpu(images, flip, shift, erase, index, seed, epoch, mean, std, dtype)
    out = normalize(_flip_and_shift(images, flip, shift), mean, std, dtype)
    _erase(out, erase, index, seed, epoch)
    return out


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, H, W, 3) uint8 -> (image / 255 - mean) / std, (B, 3, H, W) `dtype`, channels-last; fp32 or wider inside."""
    _check_images(images)
    scales, offsets = _line(mean, std)
    batch, height, width, _ = images.shape
    wide = torch.promote_types(dtype, torch.float32)
    # One constant per value of a row: the innermost loop then runs over 3 W values, not over 3.
    scale, offset = (
        torch.tensor(values, dtype=wide, device=images.device).repeat(width) for values in (scales, offsets)
    )
    out = torch.empty((batch, height, width, 3), dtype=dtype, device=images.device)
    part = IMAGES_PER_PART if images.device.type == "cpu" else max(1, batch)
    for pixels, target in zip(images.flatten(2).split(part), out.flatten(2).split(part)):  # (part, H, 3 W)
        target.copy_(torch.addcmul(offset, pixels.to(wide), scale))
    return out.permute(0, 3, 1, 2)


def _line(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Per channel the factor and the summand that make a normalised value of a byte."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must be three numbers each, std above 0, got {mean} and {std}")
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std)]


def _on_gpu(
    images: Tensor, flip: Tensor, shift: Tensor, erase: Tensor, index: Tensor,
    seed: int, epoch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if not (0 <= seed <= WORD and 0 <= epoch <= WORD):
        raise ValueError(f"augment: seed and epoch must lie in 0..{WORD}, got {seed} and {epoch}")
    batch, height, width, _ = images.shape
    out = torch.empty((batch, height, width, 3), dtype=dtype, device=images.device)
    key = (seed | epoch << 32) - (epoch >> 31 << 64)  # as a signed number of 64 bits
    if out.numel():
        _augment[(triton.cdiv(3 * height * width, VALUES), batch)](
            images.contiguous(), flip.view(torch.uint8), shift.contiguous(), erase.contiguous(), index, out, key,
            *(float(number) for numbers in _line(mean, std) for number in numbers),
            H=height, W=width, VALUES=VALUES, PURPOSE=ERASING_NOISE, num_warps=8,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)


@triton.jit
def _augment(
    images_ptr, flip_ptr, shift_ptr, erase_ptr, index_ptr, out_ptr, key, scale_0, scale_1, scale_2,
    offset_0, offset_1, offset_2, H: tl.constexpr, W: tl.constexpr, VALUES: tl.constexpr, PURPOSE: tl.constexpr,
):  # fmt: skip
    """VALUES consecutive values of one image. Erased pixels are drawn whole, three values from one counter."""
    image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * VALUES
    value = start + tl.arange(0, VALUES)
    pixel, channel = value // 3, value % 3
    y, x = pixel // W, pixel % W
    from_y, from_x = (
        y + tl.load(shift_ptr + 2 * image).to(tl.int32),
        x + tl.load(shift_ptr + 2 * image + 1).to(tl.int32),
    )
    seen = (from_y >= 0) & (from_y < H) & (from_x >= 0) & (from_x < W) & (value < 3 * H * W)
    from_x = tl.where(tl.load(flip_ptr + image) != 0, W - 1 - from_x, from_x)
    images_ptr += image * (3 * H * W)
    out_ptr += image * (3 * H * W)
    byte = tl.load(images_ptr + (from_y * W + from_x) * 3 + channel, mask=seen, other=0).to(tl.float32)
    scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
    offset = tl.where(channel == 0, offset_0, tl.where(channel == 1, offset_1, offset_2))
    out = (byte * scale + offset).to(out_ptr.dtype.element_ty)

    top, left = tl.load(erase_ptr + 4 * image).to(tl.int32), tl.load(erase_ptr + 4 * image + 1).to(tl.int32)
    bottom = top + tl.load(erase_ptr + 4 * image + 2).to(tl.int32)
    right = left + tl.load(erase_ptr + 4 * image + 3).to(tl.int32)
    if (start // 3 // W < bottom) & ((start + VALUES - 1) // 3 // W >= top) & (bottom > top):
        kept = (y < top) | (y >= bottom) | (x < left) | (x >= right)
        tl.store(out_ptr + value, out, mask=kept & (value < 3 * H * W))
        position = tl.load(index_ptr + image).to(tl.int32)
        _erase_on_gpu(out_ptr, key, position, start, top, left, bottom, right, H, W, VALUES, PURPOSE)
    elif 3 * H * W % VALUES == 0:
        tl.store(out_ptr + value, out)
    else:
        tl.store(out_ptr + value, out, mask=value < 3 * H * W)


@triton.jit
def _erase_on_gpu(
    out_ptr, key, position, start, top, left, bottom, right,
    H: tl.constexpr, W: tl.constexpr, VALUES: tl.constexpr, PURPOSE: tl.constexpr,
):  # fmt: skip
    """Noise for the pixels of VALUES values, three of one counter; the first and last pixel may be another's too."""
    pixel = start // 3 + tl.arange(0, VALUES // 2)  # half: of VALUES / 3 the next power of two
    y, x = pixel // W, pixel % W
    erased = (y >= top) & (y < bottom) & (x >= left) & (x < right) & (y < H)
    zero = pixel * 0
    a, b, c, d = tl.philox(key, pixel, zero + position, zero, zero + PURPOSE)
    first, second = _normals(a, b)
    third, _ = _normals(c, d)
    for channel in tl.static_range(3):
        noise = first if channel == 0 else second if channel == 1 else third
        at = 3 * pixel + channel
        mine = erased & (at >= start) & (at < start + VALUES)
        tl.store(out_ptr + at, noise.to(out_ptr.dtype.element_ty), mask=mine)


@triton.jit
def _normals(bits_a, bits_b):
    """As `philox.normal`. Sine and cosine are Taylor series about the nearest quarter of a turn, within 2^-23: those of
    the library would carry a reduction for any angle, in local memory."""
    radius = tl.sqrt(-2.0 * tl.log(_uniform(bits_a)))
    turns = 4.0 * _uniform(bits_b)
    quarter = tl.floor(turns + 0.5)
    x = (turns - quarter) * 1.5707963267948966  # -pi / 4 .. pi / 4
    xx = x * x
    sine = x * (1 + xx * (-1 / 6 + xx * (1 / 120 + xx * (-1 / 5040 + xx * (1 / 362880)))))
    cosine = 1 + xx * (-1 / 2 + xx * (1 / 24 + xx * (-1 / 720 + xx * (1 / 40320 + xx * (-1 / 3628800)))))
    quarter = quarter.to(tl.int32)
    swap = quarter % 2 == 1
    cosine, sine = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    cosine = tl.where((quarter == 1) | (quarter == 2), -cosine, cosine)
    sine = tl.where((quarter == 2) | (quarter == 3), -sine, sine)
    return radius * cosine, radius * sine


@triton.jit
def _uniform(bits):
    return ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


def _flip_and_shift(images: Tensor, flip: Tensor, shift: Tensor) -> Tensor:
    """Copies the part of each image that stays in view; the rest is black."""
    height, width = images.shape[1:3]
    out = torch.zeros_like(images, memory_format=torch.contiguous_format)
    for image, target, mirrored, (dy, dx) in zip(images, out, flip.tolist(), shift.tolist()):
        rows, cols = max(0, height - abs(dy)), max(0, width - abs(dx))
        source = image.flip(1) if mirrored else image
        seen = source[max(0, dy) :, max(0, dx) :][:rows, :cols]
        target[max(0, -dy) :, max(0, -dx) :][:rows, :cols] = seen
    return out


def _erase(out: Tensor, erase: Tensor, index: Tensor, seed: int, epoch: int) -> None:
    """Writes the noise into `out`, channels-last; it is computed for erased pixels only."""
    height, width = out.shape[2:]
    top, left, rows, cols = erase[:, :, None].unbind(1)  # (B, 1) each
    y, x = torch.arange(height, device=out.device), torch.arange(width, device=out.device)
    in_rows, in_cols = (y >= top) & (y < top + rows), (x >= left) & (x < left + cols)  # (B, H), (B, W)
    erased = (in_rows[:, :, None] & in_cols[:, None, :]).flatten().nonzero().squeeze(1)
    pixels = out.permute(0, 2, 3, 1).view(-1, 3)
    for part in erased.split(PIXELS_PER_PART if out.device.type == "cpu" else max(1, len(erased))):
        image, pixel = part // (height * width), part % (height * width)
        words = philox((seed, epoch), (pixel, index[image], 0, ERASING_NOISE))
        first, second = normal(words[0], words[1])
        third, _ = normal(words[2], words[3])
        pixels[part] = torch.stack((first, second, third), dim=1).to(out.dtype)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be (B, H, W, 3) uint8, got {tuple(images.shape)} {images.dtype}")


def _check(images: Tensor, flip: Tensor, shift: Tensor, erase: Tensor, index: Tensor) -> None:
    _check_images(images)
    batch = len(images)
    parameters = {
        "flip": (flip, (batch,)),
        "shift": (shift, (batch, 2)),
        "erase": (erase, (batch, 4)),
        "index": (index, (batch,)),
    }
    for name, (tensor, shape) in parameters.items():
        if tuple(tensor.shape) != shape or tensor.is_floating_point():
            raise ValueError(f"augment: {name} must be {shape} whole numbers, got {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.device != images.device:
            raise ValueError(f"augment: {name} is on {tensor.device}, the images are on {images.device}")
    if flip.dtype != torch.bool or index.dtype != torch.int64:
        raise ValueError(f"augment: flip must be bool and index int64, got {flip.dtype} and {index.dtype}")
