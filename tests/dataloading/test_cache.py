"""The file of decoded images: written once, found again, replaced when anything changed, and never half."""

import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fusionreid.dataloading import cache
from fusionreid.dataloading.cache import CachedImages, load_or_fill, place_for
from fusionreid.dataloading.records import DataError
from fusionreid.errors import StorageError

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
        yield from zip(torch.arange(len(self.images)).split(3), self.images.split(3))


def load(paths: list[str], fill, how: str = "torchvision bicubic") -> torch.Tensor | None:
    folder = Path(paths[0]).parent
    mapped = load_or_fill(folder / "cache" / "train.safetensors", str(folder), paths, SIZE, how, fill)
    return mapped and mapped.images


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


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize(
    "change", ["size", "time", "order", "fewer", "decoder", "cut", "header", "pixel", "tail", "pipe"]
)
def test_it_is_filled_again_when_anything_changed(files, change):
    load(files, Fill())
    file = Path(files[0]).parent / "cache" / "train.safetensors"
    changes = {
        "size": lambda: Path(files[2]).write_bytes(b"another image"),
        "time": lambda: os.utime(files[2], ns=(0, 1)),
        "order": files.reverse,
        "fewer": files.pop,
        "decoder": lambda: None,
        "cut": lambda: os.truncate(file, file.stat().st_size - 1),
        "pixel": lambda: flip(file, -SIZE[0] * SIZE[1] * 3 - 5),
        "tail": lambda: flip(file, -1),
        "pipe": lambda: (file.unlink(), os.mkfifo(file)),
        "header": lambda: file.write_bytes(bytes(100) + file.read_bytes()[100:]),
    }
    changes[change]()
    fill = Fill(len(files))
    assert torch.equal(load(files, fill, f"{'dali' if change == 'decoder' else 'torchvision'} bicubic"), fill.images)
    assert fill.calls == 1


def test_what_fails_half_way_leaves_nothing(files):
    def fill():
        yield [0, 1, 2], torch.zeros(3, *SIZE, 3, dtype=torch.uint8)
        raise DataError("cannot read the image")

    with pytest.raises(DataError, match="cannot read the image"):
        load(files, fill)
    assert os.listdir(Path(files[0]).parent / "cache") == ["train.lock"]


def test_who_may_only_read_uses_what_others_have_filled(files):
    load(files, Fill())
    lock = Path(files[0]).parent / "cache" / "train.lock"
    lock.unlink()
    lock.mkdir()  # cannot be opened, like another user's
    fill = Fill()
    assert load(files, fill) is not None
    assert fill.calls == 0


def test_two_that_do_not_see_each_others_lock_write_no_common_file(files, monkeypatch):
    """As where a file system locks on each host alone: one has its draft swept away, and none a wrong file."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    inner = Fill()

    def fill():
        yield [0, 1, 2], torch.zeros(3, *SIZE, 3, dtype=torch.uint8)
        with ThreadPoolExecutor(1) as other:  # as another process
            assert torch.equal(other.submit(load, files, inner).result(), inner.images)
        yield [3, 4], torch.zeros(2, *SIZE, 3, dtype=torch.uint8)

    with pytest.raises(FileNotFoundError):
        load(files, fill)
    assert torch.equal(load(files, None), inner.images)
    assert sorted(os.listdir(Path(files[0]).parent / "cache")) == ["train.lock", "train.safetensors"]


def test_a_replacement_is_not_kept_for_the_file_itself(files):
    def fill():
        yield [0, 1, 2], torch.zeros(3, *SIZE, 3, dtype=torch.uint8)
        yield [1, 4], torch.ones(2, *SIZE, 3, dtype=torch.uint8)

    assert load(files, fill).sum() == 2 * 3 * SIZE[0] * SIZE[1]
    assert load(files, None) is None
    assert load([*files[:3], files[1], files[4]], None) is not None


def test_batches_are_rows_of_what_stays(files):
    fill = Fill(5)
    load(files, fill)
    batches = [np.array([4, 1, 1]), np.array([3, 1, 2]), np.array([2])]
    for share in (slice(None), slice(1, 5)):
        source = CachedImages(mapped_images(files), share, "host", CPU)
        for batch, (stay, rows) in zip(batches, source(batches), strict=True):
            assert torch.equal(stay[rows], fill.images[batch])
    source.close()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(source(batches))


def mapped_images(files: list[str]) -> cache.MappedImages:
    folder = Path(files[0]).parent
    file = folder / "cache" / "train.safetensors"
    mapped = load_or_fill(file, str(folder), files, SIZE, "torchvision bicubic", None)
    assert mapped is not None
    return mapped


def test_a_file_that_is_cut_while_in_use_is_an_error_not_a_signal(files):
    load(files, Fill())
    source = CachedImages(mapped_images(files), slice(None), "host", CPU)
    batches = source([np.array([0]), np.array([4])])
    next(batches)
    file = Path(files[0]).parent / "cache" / "train.safetensors"
    os.truncate(file, 1000)
    with pytest.raises(StorageError, match=f"{file}, the decoded images in use, has been cut short: delete it"):
        next(batches)


def test_damage_in_any_block_is_found_and_told(files, monkeypatch, caplog):
    monkeypatch.setattr(cache, "BLOCK", 1000)
    fill = Fill()
    load(files, fill)
    file = Path(files[0]).parent / "cache" / "train.safetensors"
    for position in range(1, 5 * SIZE[0] * SIZE[1] * 3, 97):
        flip(file, -position)
        caplog.clear()
        assert load(files, None) is None
        assert f"{file} does not hold what was written" in caplog.text
        flip(file, -position)
    assert torch.equal(load(files, None), fill.images)


def test_where_images_stay(monkeypatch):
    monkeypatch.setattr(cache, "free_host_memory", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert [place_for(size, GPU, size) for size in (250, 251, 500, 501)] == ["device", "host", "host", "none"]
    assert [place_for(size, GPU, size // 2) for size in (501, 502)] == ["device", "none"]
    assert [place_for(size, CPU, size) for size in (250, 500, 501)] == ["host", "host", "none"]
