"""The file of decoded images: written once, found again, written anew when anything changed, and never half."""

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloading import cache
from dataloading.cache import ResidentPixels, load_or_fill, place_for
from dataloading.records import DataError
from tests.test_loader import loader, make_split, same

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZE = (16, 8)


@pytest.fixture
def files(tmp_path) -> list[str]:
    paths = [tmp_path / "data" / f"{i}.jpg" for i in range(5)]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(b"image")
    return [str(path) for path in paths]


class Fill:
    """Images of random pixels in two batches, counting how often it was asked for them."""

    def __init__(self, count: int = 5) -> None:
        self.images = torch.randint(256, (count, *SIZE, 3), dtype=torch.uint8)
        self.calls = 0

    def __call__(self):
        self.calls += 1
        yield from self.images.split(3)


def load(paths: list[str], fill, how: str = "torchvision bicubic") -> torch.Tensor:
    folder = Path(paths[0]).parent
    return load_or_fill(folder / "cache" / "train.safetensors", str(folder), paths, SIZE, how, fill)


def test_it_is_filled_once(files):
    fill = Fill()
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load(files, fill), range(8)))
    assert fill.calls == 1
    assert all(torch.equal(images, fill.images) for images in loaded)
    assert sorted(os.listdir(Path(files[0]).parent / "cache")) == ["train.lock", "train.safetensors"]


def test_it_moves_with_its_data_set(files):
    load(files, Fill())
    old = Path(files[0]).parent
    shutil.move(old, old.parent / "elsewhere")
    fill = Fill()
    load([path.replace("/data/", "/elsewhere/") for path in files], fill)
    assert fill.calls == 0


@pytest.mark.parametrize("change", ["size", "time", "order", "fewer", "decoder", "cut", "header"])
def test_it_is_filled_anew_when_anything_changed(files, change):
    load(files, Fill())
    file = Path(files[0]).parent / "cache" / "train.safetensors"
    changes = {
        "size": lambda: Path(files[2]).write_bytes(b"another image"),
        "time": lambda: os.utime(files[2], ns=(0, 1)),
        "order": files.reverse,
        "fewer": files.pop,
        "decoder": lambda: None,
        "cut": lambda: os.truncate(file, file.stat().st_size - 1),
        "header": lambda: file.write_bytes(bytes(100) + file.read_bytes()[100:]),
    }
    changes[change]()
    fill = Fill(len(files))
    assert torch.equal(load(files, fill, f"{'dali' if change == 'decoder' else 'torchvision'} bicubic"), fill.images)
    assert fill.calls == 1


def test_what_fails_half_way_leaves_nothing(files):
    def fill():
        yield torch.zeros(3, *SIZE, 3, dtype=torch.uint8)
        raise DataError("cannot read the image")

    with pytest.raises(DataError, match="cannot read the image"):
        load(files, fill)
    assert os.listdir(Path(files[0]).parent / "cache") == ["train.lock"]
    os.remove(files[1])
    with pytest.raises(DataError, match=r"cannot read the image .*1\.jpg: No such file"):
        load(files, Fill())


def test_batches_are_rows_of_what_stays():
    images = torch.randint(256, (7, *SIZE, 3), dtype=torch.uint8)
    pixels = ResidentPixels(images, "host", CPU)
    batches = [np.array([6, 0, 0]), np.array([3, 1, 2]), np.array([5])]
    for batch, (stay, rows) in zip(batches, pixels(batches), strict=True):
        assert stay is images
        assert rows.tolist() == batch.tolist()
    pixels.close()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(pixels(batches))


def test_where_images_stay(monkeypatch):
    monkeypatch.setattr(cache, "free_host_memory", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert [place_for(size, GPU) for size in (250, 251, 500, 501)] == ["device", "host", "host", "none"]
    assert [place_for(size, CPU) for size in (250, 500, 501)] == ["host", "host", "none"]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return make_split(tmp_path_factory.mktemp("market"))


def test_resident_images_are_the_files_and_need_no_decoder(split, monkeypatch):
    plain = list(loader(split).batches(1))
    for world_size in (1, 2):
        for rank in range(world_size):
            one = list(loader(split, rank=rank, world_size=world_size).batches(2))
            assert same(list(loader(split, cache="host", rank=rank, world_size=world_size).batches(2)), one)
    monkeypatch.setattr("dataloading.worker.decode_batch", None)
    train = loader(split, cache="auto", workers=2)
    assert "30 training images of 32 x 16, 0 MB decoded: resident in host memory, from " in train.note
    next(train.batches(0))
    assert same(list(train.batches(1)), plain)
    train.close()


def test_no_room_on_the_disk(split, monkeypatch, caplog):
    os.remove(next(Path(split.root).glob(".fusionreid-train-*.safetensors")))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DataError, match=r"CACHE host: .* has no room for .* GB of decoded images; set none"):
        loader(split, cache="host")
    with caplog.at_level(logging.WARNING):
        train = loader(split, cache="auto")
    assert "decoded anew by torchvision in every epoch" in train.note
    assert "every image is decoded anew" in caplog.text


def test_device_memory_needs_a_device(split):
    with pytest.raises(DataError, match=r"DATALOADER\.CACHE device needs a GPU; set host, or auto"):
        loader(split, cache="device")
