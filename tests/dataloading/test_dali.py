"""The DALI graph on a CPU: pixels as Pillow's, files that DALI reads otherwise or not at all, epochs left half-way."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is an extra")

from fusionreid.dataloading.dali import DaliDecoder
from fusionreid.dataloading.decode import BICUBIC, BILINEAR, decode_batch
from fusionreid.dataloading.records import DataError
from fusionreid.kernels import augment
from tests import ROOT
from tests.dataloading.test_decode import pillow, save, smooth
from tests.dataloading.test_records import BAD, GOOD, image_bytes

CPU = torch.device("cpu")
SHAPES = [(128, 64), (256, 128), (300, 90), (384, 160), (61, 200), (1000, 480), (1, 400), (900, 1)]


def pixels_of(paths, size=(64, 32), resize=BICUBIC, batch_size=4, normalize=None) -> DaliDecoder:
    def fallback(positions):
        return decode_batch([paths[i] for i in positions], size, resize)

    settings = {"batch_size": batch_size, "num_threads": 2, "device": CPU, "normalize": normalize}
    return DaliDecoder(paths, size, resize, fallback=fallback, **settings)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    for i in range(10):
        smooth(128 + i, 64).save(folder / f"{i}.jpg", quality=92)
    return [str(folder / f"{i}.jpg") for i in range(10)]


@pytest.mark.parametrize("resize", [BICUBIC, BILINEAR])
def test_resize_as_pillow(tmp_path, resize):
    paths = [str(tmp_path / f"{height}x{width}.jpg") for height, width in SHAPES]
    for path, shape in zip(paths, SHAPES):
        smooth(*shape).save(path, quality=92)
    ((batch, _),) = pixels_of(paths, (256, 128), resize, batch_size=len(paths))([np.arange(len(paths))])
    assert (batch.shape, batch.dtype) == ((len(paths), 256, 128, 3), torch.uint8)
    for path, image in zip(paths, batch):
        difference = np.abs(image.numpy().astype(int) - pillow(path, (256, 128), resize))
        assert difference.max() <= 2, path
        assert difference.mean() <= 0.3, path


def test_every_kind_of_file_is_what_the_other_decoder_reads(tmp_path):
    turned = type(smooth(1, 1).getexif())()
    turned[0x0112] = 6
    kinds = GOOD | {
        "turned.jpg": image_bytes(exif=turned),
        "cmyk.jpg": image_bytes(mode="CMYK"),
        "two_frames.jpg": image_bytes("GIF", mode="P", save_all=True, append_images=[smooth(128, 64)]),
        "deep.png": image_bytes("PNG", mode="I;16"),
        **{f"{mode}.png": image_bytes("PNG", mode=mode) for mode in ("RGBA", "LA", "P", "1")},
        **{f"{kind}.jpg": image_bytes(kind) for kind in ("BMP", "TIFF", "WEBP")},
    }
    paths = [save(tmp_path / name, data) for name, data in kinds.items()]
    ((batch, _),) = pixels_of(paths, (128, 64), batch_size=len(paths))([np.arange(len(paths))])
    one_by_one = pixels_of(paths, (128, 64), batch_size=1)([np.array([i]) for i in range(len(paths))])
    for name, image, (alone, _), expected in zip(kinds, batch, one_by_one, decode_batch(paths, (128, 64), BICUBIC)):
        for read in (image, alone[0]):
            assert (read.int() - expected.int()).abs().max() <= 2, name


def test_batches_come_in_order_and_an_epoch_may_be_left(paths):
    pixels = pixels_of(paths)
    order = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    batches = np.split(order, [4, 8])
    alone = torch.cat([next(pixels_of([path])([np.array([0])]))[0].clone() for path in paths])
    for _ in range(2):
        assert torch.equal(torch.cat([batch.clone() for batch, _ in pixels(batches)]), alone[order])
        left = pixels(batches[::-1])
        assert torch.equal(next(left)[0], alone[batches[-1]])
    assert list(pixels([])) == []


def test_the_graph_flips_pads_crops_and_normalises_as_augment_does(paths, tmp_path):
    """Also images that DALI hands back; black borders are black before they are normalised."""
    files = [*paths, save(tmp_path / "other.png", image_bytes("PNG"))]
    line = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}
    order = np.array([3, 10, 4, 1, 5, 9, 2, 6, 10, 0])
    flip = np.array([True, False] * 5)
    shift = np.array([[0, 0], [3, -5], [-4, 6], [2, 7], [-1, -9], [40, 3], [-40, -3], [9, 30], [1, 1], [63, 31]])
    decoded = torch.cat([pixels.clone() for pixels, _ in pixels_of(files)(np.split(order, [4, 8]))])
    zeros = torch.zeros(10, 4, dtype=torch.int64)
    given = torch.from_numpy(flip), torch.from_numpy(shift), zeros, zeros[:, 0]
    expected = augment(decoded, *given, seed=0, epoch=0, **line)
    source = pixels_of(files, normalize=tuple(line.values()))
    batches = list(zip(*(np.split(values, [4, 8]) for values in (order, flip, shift))))
    for _ in range(2):
        found = torch.cat([images.clone() for images in source.augmented(batches)])
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        next(source.augmented(batches[::-1]))  # an epoch may be left


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_and_the_next_batches_are_right(paths, tmp_path, name):
    files = [*paths[:2], save(tmp_path / name, BAD[name][0]), *paths[2:4]]
    pixels = pixels_of(files)
    batches = pixels([np.array([0, 1]), np.array([1, 2]), np.array([3, 4])])
    next(batches)
    with pytest.raises(DataError, match=f"cannot read the image .*{name}: "):
        next(batches)
    first, second = (batch.clone() for batch, _ in pixels([np.array([0]), np.array([3])]))
    expected = decode_batch([files[0], files[3]], (64, 32), BICUBIC)
    assert (torch.cat([first, second]).int() - expected.int()).abs().max() <= 2


def test_a_closed_one_says_so(paths):
    pixels = pixels_of(paths)
    pixels.close()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(pixels([np.array([0])]))


RUN = """
import signal, sys
import numpy as np
from tests.dataloading.test_dali import pixels_of

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore
pixels = pixels_of(sys.argv[1:])
while True:
    for _ in pixels([np.arange(4)] * 100):
        print(".", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once(paths, number):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", RUN, *paths], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          env=environment) as run:  # fmt: skip
        try:
            assert run.stdout.readline() == b".\n"
            run.send_signal(number)
            run.communicate(timeout=10)
        finally:
            run.kill()
    assert run.returncode in (-number, 128 + number)
