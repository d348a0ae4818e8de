import io
import os
import resource
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fusionreid.dataloading.decode import BICUBIC, BILINEAR, decode, decode_batch
from fusionreid.dataloading.records import DataError
from tests.dataloading.test_records import BAD, GOOD, JPEG, image_bytes
from tests.numerics import FIXTURES

FILTERS = {BICUBIC: Image.Resampling.BICUBIC, BILINEAR: Image.Resampling.BILINEAR}


def smooth(height: int, width: int) -> Image.Image:
    """A picture with edges and gradients; white noise would only test what no camera sees."""
    rng = np.random.default_rng(height * width)
    coarse = rng.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pillow(path: str, size: tuple[int, int], interpolation) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    return np.asarray(image.resize(size[::-1], FILTERS[interpolation])).astype(int)


def save(path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_recorded_resize(tmp_path):
    with np.load(FIXTURES / "modules/resize_image.npz") as recorded:
        path = str(tmp_path / "image.png")
        Image.fromarray(recorded["in/image"]).save(path)
        for name, size, interpolation in (
            ("train_resize_bicubic_256x128", (256, 128), BICUBIC),
            ("test_resize_bilinear_256x128", (256, 128), BILINEAR),
            ("test_resize_bilinear_384x128", (384, 128), BILINEAR),
        ):
            difference = np.abs(decode(path, size, interpolation).numpy().astype(int) - recorded[name])
            assert difference.max() <= 2, name
            assert difference.mean() <= 0.01, name


@pytest.mark.parametrize("interpolation", [BICUBIC, BILINEAR])
@pytest.mark.parametrize(
    "shape", [(128, 64), (256, 128), (300, 90), (384, 160), (61, 200), (1000, 480), (1, 400), (900, 1)]
)
def test_resize_as_pillow(tmp_path, shape, interpolation):
    smooth(*shape).save(tmp_path / "image.jpg", quality=92)
    path = str(tmp_path / "image.jpg")
    out = decode(path, (256, 128), interpolation)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((256, 128, 3), torch.uint8, True)
    difference = np.abs(out.numpy().astype(int) - pillow(path, (256, 128), interpolation))
    assert difference.max() <= 2
    assert difference.mean() <= 0.3


def test_every_kind_of_file_is_what_pillow_reads(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    deep = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (128, 64), dtype=np.uint16)).save(deep, "PNG")
    frames = io.BytesIO()
    smooth(128, 64).save(frames, "GIF", save_all=True, append_images=[Image.new("RGB", (64, 128))])
    kinds = GOOD | {
        "turned.jpg": image_bytes(exif=exif),
        "alpha.png": image_bytes("PNG", mode="RGBA"),
        "gray_alpha.png": image_bytes("PNG", mode="LA"),
        "palette.png": image_bytes("PNG", mode="P"),
        "one_bit.png": image_bytes("PNG", mode="1"),
        "deep.png": deep.getvalue(),
        "frames.gif": frames.getvalue(),
        "bitmap.bmp": image_bytes("BMP"),
        "print.tiff": image_bytes("TIFF", mode="CMYK"),
        "plain.webp": image_bytes("WEBP"),
    }
    for name, data in kinds.items():
        path = save(tmp_path / name, data)
        height, width = (4000, 1) if name == "thin.webp" else (1, 1) if name == "one_pixel.png" else (128, 64)
        difference = np.abs(
            decode(path, (height, width), BICUBIC).numpy().astype(int) - pillow(path, (height, width), BICUBIC)
        )
        assert difference.max() <= 2, name
    assert decode(str(tmp_path / "turned.jpg"), (128, 64), BICUBIC).shape == (128, 64, 3)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_an_error_with_its_name(tmp_path, name):
    with pytest.raises(DataError, match=f"cannot read the image .*{name}: "):
        decode(save(tmp_path / name, BAD[name][0]), (64, 32), BICUBIC)


def test_what_is_no_file_is_an_error_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    for name, message in {"fifo.jpg": "not a regular file", ".": "directory", "missing.jpg": "No such file"}.items():
        with pytest.raises(DataError, match=message):
            decode(str(tmp_path / name), (64, 32), BICUBIC)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_strange_bytes_never_escape_as_another_error(tmp_path):
    rng = np.random.default_rng(0)
    seeds = [JPEG, image_bytes("PNG"), image_bytes("GIF", mode="P"), image_bytes("TIFF"), image_bytes("WEBP")]
    failed = 0
    for i in range(300):
        data = bytearray(seeds[i % len(seeds)])
        for position in rng.integers(0, min(len(data), 600), 8):
            data[position] = rng.integers(256)
        try:
            decode(save(tmp_path / "fuzzed", bytes(data)), (16, 8), BILINEAR)
        except DataError:
            failed += 1
    assert 0 < failed < 300


def test_a_lying_header_costs_no_memory(tmp_path):
    size = JPEG.index(b"\xff\xc0") + 5
    bomb = save(tmp_path / "bomb.jpg", JPEG[:size] + (5001).to_bytes(2, "big") * 2 + JPEG[size + 4 :])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="5001 x 5001 pixels, more than 25,000,000"):
        decode(bomb, (256, 128), BICUBIC)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


def test_names_with_any_bytes(tmp_path):
    for name in (os.fsdecode(b"\xff\xfe .jpg"), "é ü.jpg", "x" * 251 + ".jpg"):
        assert decode(save(tmp_path / name, JPEG), (16, 8), BILINEAR).shape == (16, 8, 3)
    with pytest.raises(DataError) as caught:
        decode(save(tmp_path / os.fsdecode(b"\xff.jpg"), b""), (16, 8), BILINEAR)
    assert r"\xff.jpg: empty file" in str(caught.value).encode().decode()


def test_a_batch(tmp_path):
    sizes = [(20, 40), (64, 128), *[(60, 128)] * 24, (64, 128), (1200, 900)]  # more of one size than a run
    paths = [save(tmp_path / f"{i}.jpg", image_bytes(size=size)) for i, size in enumerate(sizes)]
    batch = decode_batch(paths, (32, 16), BICUBIC)
    assert batch.shape == (28, 32, 16, 3)
    for path, pixels in zip(paths, batch):
        assert torch.equal(pixels, decode(path, (32, 16), BICUBIC))
    assert decode_batch([], (32, 16), BICUBIC).shape == (0, 32, 16, 3)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"mode": "L"}])
@pytest.mark.parametrize("sides", [(136, 64), (192, 64), (128, 72), (1000, 640)])
def test_a_jpeg_whose_header_promises_more_than_there_is(tmp_path, options, sides):
    data = image_bytes(**options)
    place = data.index(b"\xff\xc2" if "progressive" in options else b"\xff\xc0") + 5
    path = save(tmp_path / "lies.jpg", data[:place] + struct.pack(">HH", *sides) + data[place + 4 :])
    with pytest.raises(DataError, match=rf"its header says {sides[1]} x {sides[0]} pixels, its data end before"):
        decode(path, (32, 16), BICUBIC)


def test_a_grey_image_is_no_lie(tmp_path):
    for options in ({}, {"progressive": True}, {"subsampling": 0}):
        file = io.BytesIO()
        Image.new("RGB", (64, 128), (128, 128, 128)).save(file, "JPEG", **options)
        assert (decode(save(tmp_path / "grey.jpg", file.getvalue()), (32, 16), BICUBIC) == 128).all()
