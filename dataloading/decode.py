"""An image file to RGB pixels of the wanted size: torchvision for the JPEGs it reads as Pillow does, else Pillow."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from dataloading.records import DataError, open_image, read_file, shown

Filter = Literal["bicubic", "bilinear"]
BICUBIC: Filter = "bicubic"  # training
BILINEAR: Filter = "bilinear"  # test


def decode(path: str, size: tuple[int, int], resize: Filter) -> Tensor:
    """(H, W, 3) uint8; size is (H, W) in pixels. The first frame; never turned by EXIF; alpha is dropped."""
    try:
        pixels = _decode(read_file(path))
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise DataError(f"cannot read the image {shown(path)}: {error}") from error
    # As a batch of one it is channels-last to the kernel, which then neither unpacks nor packs the colours.
    resized = interpolate(pixels[None].permute(0, 3, 1, 2), size, mode=resize, antialias=True)
    return resized[0].permute(1, 2, 0)


def _decode(data: bytes) -> Tensor:
    """(H, W, 3) uint8, in the file's own size."""
    image = open_image(data)
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB).permute(1, 2, 0)
    return torch.from_numpy(np.array(image.convert("RGB")))


def decode_batch(paths: Sequence[str], size: tuple[int, int], resize: Filter) -> Tensor:
    """(B, H, W, 3) uint8."""
    batch = torch.empty((len(paths), *size, 3), dtype=torch.uint8)
    for path, pixels in zip(paths, batch):
        pixels.copy_(decode(path, size, resize))
    return batch
