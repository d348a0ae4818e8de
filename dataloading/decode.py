"""An image file to RGB pixels of the wanted size: torchvision for the JPEGs it reads as Pillow does, else Pillow."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from dataloading.records import DataError, open_image, read_file, shown

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR  # training, test


def decode(path: str, size: tuple[int, int], interpolation: InterpolationMode) -> Tensor:
    """(H, W, 3) uint8; size is (H, W) in pixels. The first frame; never turned by EXIF; alpha is dropped."""
    try:
        pixels = _decode(read_file(path))
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise DataError(f"cannot read the image {shown(path)}: {error}") from error
    resized = resize(pixels.permute(2, 0, 1), list(size), interpolation, antialias=True)
    return resized.permute(1, 2, 0).contiguous()


def _decode(data: bytes) -> Tensor:
    """(H, W, 3) uint8, in the file's own size."""
    image = open_image(data)
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB).permute(1, 2, 0)
    return torch.from_numpy(np.array(image.convert("RGB")))


def decode_batch(paths: Sequence[str], size: tuple[int, int], interpolation: InterpolationMode) -> Tensor:
    """(B, H, W, 3) uint8."""
    return torch.stack([decode(path, size, interpolation) for path in paths])
