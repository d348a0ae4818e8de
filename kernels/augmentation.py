"""Augmentation of a batch: flip, shift with a black border, normalise, erase a rectangle with per-pixel noise.

    out[b, :, y, x] = (in[b, y + dy, x' + dx] / 255 - mean) / std,  x' mirrored where flip[b], 0 outside the image
    out[b, c, y, x] = normal_c(seed, epoch, index[b], y * W + x)  in the rectangle erase[b] = (top, left, height, width)

Source: He et al., Bag of tricks and a strong baseline for person re-identification, arXiv:1903.07071; erasing:
Zhong et al., arXiv:1708.04896. B images, H W pixels; the parameters come from the sampling plan, noise from Philox.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.philox import ERASING_NOISE, normal, philox

# On a CPU the work goes in parts whose temporaries stay in the cache: 4x (one core, B = 128, 256x128).
IMAGES_PER_PART = 8
PIXELS_PER_PART = 1 << 15


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
    out = normalize(_flip_and_shift(images, flip, shift), mean, std, dtype)
    _erase(out, erase, index, seed, epoch)
    return out


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, H, W, 3) uint8 -> (image / 255 - mean) / std, (B, 3, H, W) `dtype`, channels-last; fp32 or wider inside."""
    _check_images(images)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"normalize: mean and std must be three numbers each, std above 0, got {mean} and {std}")
    batch, height, width, _ = images.shape
    wide = torch.promote_types(dtype, torch.float32)
    # One constant per value of a row: the innermost loop then runs over 3 W values, not over 3.
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=wide, device=images.device).repeat(width)
    offset = torch.tensor([-m / s for m, s in zip(mean, std)], dtype=wide, device=images.device).repeat(width)
    out = torch.empty((batch, height, width, 3), dtype=dtype, device=images.device)
    part = IMAGES_PER_PART if images.device.type == "cpu" else max(1, batch)
    for pixels, target in zip(images.flatten(2).split(part), out.flatten(2).split(part)):  # (part, H, 3 W)
        target.copy_(torch.addcmul(offset, pixels.to(wide), scale))
    return out.permute(0, 3, 1, 2)


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
