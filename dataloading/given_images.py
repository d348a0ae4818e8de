"""Images as a program holds them, paths, Pillow images or arrays, to the pixels that their files would give."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusionreid.dataloading.decode import read_pixels, rgb_pixels
from fusionreid.dataloading.records import DataError, printable

GivenImage: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray  # an array: (H, W, 3) uint8
Channels = Literal["rgb", "bgr"]


def as_images(given: GivenImage | Iterable[GivenImage]) -> Iterator[Any]:
    """Iterate over the images given; a single one counts as a list of one, an array (N, H, W, 3) as N images."""
    if isinstance(given, np.ndarray):
        single = given.ndim != 4 and given.dtype != object
    else:
        single = isinstance(given, (str, bytes, os.PathLike, Image.Image)) or not isinstance(given, Iterable)
    images: Any = [given] if single else given
    return iter(images)


def name_of(image: object, position: int) -> str:
    """Name an image in a message: by its path if it has one, else by its position."""
    return printable(image) if isinstance(image, (str, os.PathLike)) else f"images[{position}]"


def pixels_of(image: GivenImage, name: str, channels: Channels = "rgb") -> Tensor:
    """Pixels (h, w, 3) uint8, RGB, of one image that messages call `name`.

    `channels` is the order in arrays alone, since files and Pillow images tell their own. A grey array counts as three
    equal channels, as a grey file does. DataError says why an image cannot be used.
    """
    if channels not in ("rgb", "bgr"):
        raise DataError(f"channels must be 'rgb', or 'bgr' for the arrays of OpenCV, got {channels!r}")
    if isinstance(image, np.ndarray):
        return _of_array(image, name, channels)
    if isinstance(image, Image.Image):
        try:
            return rgb_pixels(image)
        except Exception as error:  # decoders raise whatever a broken file leads them to
            raise DataError(f"cannot read the image {name}: {error}") from error
    if not isinstance(image, (str, os.PathLike)):
        raise DataError(
            f"{name} must be a path, a Pillow image or a NumPy array (H, W, 3) uint8, got {type(image).__name__}; of a "
            "torch tensor (3, H, W) pass tensor.permute(1, 2, 0).cpu().numpy()"
        )
    path = Path(image).expanduser()
    if path.is_dir():
        raise DataError(f"{name} is a folder: name the images in it, as in sorted(Path({str(image)!r}).glob('*.jpg'))")
    if not path.exists():
        raise DataError(f"there is no image {name}: check the path; relative ones start in {Path.cwd()}")
    return read_pixels(str(path))


def _of_array(array: np.ndarray, name: str, channels: Channels) -> Tensor:
    if array.dtype != np.uint8:
        scale = "(255 * image).round()" if array.dtype.kind == "f" else "image"
        raise DataError(
            f"{name} must be uint8, values from 0 to 255, got {array.dtype}; values from 0 to "
            f"{'1' if array.dtype.kind == 'f' else '255'} become so by {scale}.astype('uint8')"
        )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3):
        remedy = "keep three channels" if array.ndim == 3 and array.shape[2] == 4 else "channels come last"
        example = "image[..., :3]" if remedy.startswith("keep") else "image.transpose(1, 2, 0)"
        raise DataError(f"{name} must be an array (H, W, 3), or (H, W) if grey, got {array.shape}: {remedy}, {example}")
    if not array.size:
        raise DataError(f"{name} is empty, its shape is {array.shape}: leave out boxes that lie outside of their frame")
    ordered = array[..., ::-1] if channels == "bgr" else array
    return torch.from_numpy(np.broadcast_to(ordered, (*array.shape[:2], 3)).copy("C"))
