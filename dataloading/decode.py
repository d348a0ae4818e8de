"""Image file to RGB pixels of the wanted size: torchvision for the JPEGs that it reads as Pillow does, else Pillow."""

from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from fusionreid.dataloading.image_files import open_image, read_file
from fusionreid.dataloading.records import DataError, printable

Filter = Literal["bicubic", "bilinear"]
BICUBIC: Filter = "bicubic"  # training
BILINEAR: Filter = "bilinear"  # test
GREY = 128  # what is left of a JPEG where data are missing
MORE = bytes(range(1, 128)) * 8
RUN_BYTES = 1 << 18  # of pixels resized together: one by one takes a sixth longer (one core, 128 x 64 to 256 x 128)


def decode(path: str, size: tuple[int, int], resize: Filter) -> Tensor:
    """Decode to (H, W, 3) uint8, size (H, W) in pixels: the first frame, never turned by EXIF, without alpha."""
    return _resize(read_pixels(path)[None], size, resize)[0]


def read_pixels(path: str) -> Tensor:
    """Decode to (h, w, 3) uint8 in the file's own size. DataError: it cannot be read."""
    try:
        return pixels_in(read_file(path))
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise DataError(f"cannot read the image {printable(path)}: {error}") from error


def _resize(images: Tensor, size: tuple[int, int], resize: Filter) -> Tensor:
    # Channels-last to the kernel, which then neither unpacks nor packs the colours.
    return interpolate(images.permute(0, 3, 1, 2), size, mode=resize, antialias=True).permute(0, 2, 3, 1)


def pixels_in(data: bytes) -> Tensor:
    """Decode the content of a file to (h, w, 3) uint8 in its own size; it raises whatever a decoder does."""
    image = open_image(data)
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        pixels = _decode_jpeg(data)
        if (pixels[:, -1, -1] == GREY).all() and _ends_early(data, pixels):
            raise ValueError(f"its header says {image.width} x {image.height} pixels, its data end before")
        return pixels.permute(1, 2, 0)
    return rgb_pixels(image)


def rgb_pixels(image: Image.Image) -> Tensor:
    """Decode an image that Pillow has opened to (h, w, 3) uint8, without alpha."""
    return torch.from_numpy(np.array(image.convert("RGB")))


def _decode_jpeg(data: bytes) -> Tensor:
    pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return pixels


def _ends_early(data: bytes, pixels: Tensor) -> bool:
    """Tell whether the decoder ran out of data before the last pixel, and left the rest grey.

    More data before the end marker then change the picture; else nothing reads them.
    """
    end = data.rfind(b"\xff\xd9")
    return not torch.equal(_decode_jpeg(data[:end] + MORE + data[end:]), pixels)


def decode_batch(paths: Sequence[str], size: tuple[int, int], resize: Filter) -> Tensor:
    """Decode to (B, H, W, 3) uint8."""
    return resize_batch(map(read_pixels, paths), len(paths), size, resize)


def resize_batch(images: Iterable[Tensor], count: int, size: tuple[int, int], resize: Filter) -> Tensor:
    """Resize `count` images (h, w, 3) uint8 to (B, H, W, 3). Neighbours of one size are resized together."""
    batch, start = torch.empty((count, *size, 3), dtype=torch.uint8), 0
    for shape, same in groupby(images, lambda pixels: pixels.shape):
        while run := list(islice(same, max(1, RUN_BYTES // shape.numel()))):
            batch[start : start + len(run)] = _resize(torch.stack(run), size, resize)
            start += len(run)
    return batch
