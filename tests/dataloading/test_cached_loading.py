"""Loaders on cached images: the same batches, decoded once, by any number of ranks."""

import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusionreid.dataloading import read_split
from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.config import DataloaderConfig, DatasetsConfig
from fusionreid.dataloading.decode import decode_batch
from fusionreid.dataloading.loader import Batch, TestLoader
from fusionreid.dataloading.records import DataError
from tests.dataloading.test_loader import INPUT, loader, make_split, same


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return make_split(tmp_path_factory.mktemp("market"))


def test_cached_images_are_the_files_and_need_no_decoder(split, monkeypatch):
    plain = list(loader(split).batches(1))
    for world_size in (1, 2):
        for rank in range(world_size):
            one = list(loader(split, rank=rank, world_size=world_size).batches(2))
            assert same(list(loader(split, cache="host", rank=rank, world_size=world_size).batches(2)), one)
    monkeypatch.setattr("fusionreid.dataloading.decode_workers.decode_batch", None)
    train = loader(split, cache="auto", workers=2)
    assert "30 train images of 32 x 16, 0 MB decoded: cached in host memory, from " in train.note
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
    assert "decoded by torchvision at every use" in train.note
    assert "every image is decoded at every use" in caplog.text


def test_device_memory_needs_a_device(split):
    assert "cached in host memory" in images_of(split, cache="device", fill=True).note
    with pytest.raises(DataError, match=r"DATALOADER\.CACHE device needs a GPU; set host, or auto"):
        loader(split, cache="device")


def images_of(split, cache: str = "auto", backend: str = "auto", workers: int = 0, **settings) -> TestLoader:
    loading = DataloaderConfig(NUM_WORKERS=workers, CACHE=cache, BACKEND=backend)
    return TestLoader((*split.query, *split.gallery), INPUT, loading, batch_size=8, root=split.root, **settings)


def files_of_test_images(split) -> list[Path]:
    return list(Path(split.root).glob(".fusionreid-test-*.safetensors"))


def test_query_and_gallery_are_decoded_once(tmp_path, monkeypatch):
    split, read = make_split(tmp_path), []
    plain = list(images_of(split, "none"))

    def counting(paths, *how):
        read.extend(paths)
        return decode_batch(paths, *how)

    monkeypatch.setattr("fusionreid.dataloading.decode_workers.decode_batch", counting)
    assert "decoded by torchvision at every use" in images_of(split).note  # asked only to use a file, it writes none
    assert not files_of_test_images(split)
    assert not read
    test = images_of(split, fill=True)
    assert sorted(read) == sorted(record.path for record in (*split.query, *split.gallery))
    assert same(list(test), plain)
    assert same(list(test), plain)
    assert same(list(images_of(split)), plain)
    assert len(read) == 35
    assert f"35 test images of 24 x 16, 0 MB decoded: cached in host memory, from {split.root}" in test.note


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_has_its_share_of_the_cached_images(split, world_size):
    def shares(cache: str) -> list[Batch]:
        return [list(images_of(split, cache, rank=rank, world_size=world_size, fill=True)) for rank in ranks]

    ranks = range(world_size)
    cached, plain = shares("auto"), shares("none")
    assert all(same(one, other) for one, other in zip(cached, plain, strict=True))
    assert len({sum(len(batch.images) for batch in share) for share in cached}) == 1
    indices = [i for share in cached for batch in share for i in batch.indices.tolist()]
    assert indices == [*range(35), *[34] * (len(indices) - 35)]


def test_an_evaluation_needs_no_room_on_the_disk(split, monkeypatch, caplog):
    for file in files_of_test_images(split):
        file.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    test = images_of(split, "host", fill=True)
    assert "every image is decoded at every use" in caplog.text
    assert len(list(test)) == 5


def test_lists_side_by_side_have_files_of_their_own(tmp_path):
    market = make_split(tmp_path)
    rows = [(r.path, r.person, r.camera, part) for part in ("train", "query", "gallery") for r in getattr(market, part)]
    splits = []
    for name, some in (("all", rows), ("few", rows[4:])):
        lines = ["path,person,camera,split", *(",".join(map(str, row)) for row in some)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        splits.append(read_split(DatasetsConfig(NAMES="csv", ROOT_DIR=str(tmp_path / f"{name}.csv"))))
    for split in splits:
        images_of(split, fill=True)
        loader(split, cache="host").close()
    assert all("cached in" in images_of(split).note for split in splits)
    assert len(list(tmp_path.glob(".fusionreid-*.safetensors"))) == 4


def test_no_file_is_left_of_images_that_cannot_be_read(tmp_path):
    split = make_split(tmp_path)
    Path(split.gallery[3].path).write_bytes(b"")
    with pytest.raises(DataError, match=r"^cannot read the image .*: empty file"):
        images_of(split, fill=True)
    assert not files_of_test_images(split)


def test_a_replaced_image_is_decoded_itself_when_it_is_back(tmp_path, monkeypatch):
    monkeypatch.setattr("fusionreid.dataloading.fallback_reader.time", SimpleNamespace(sleep=lambda _: None))
    split, bad = make_split(tmp_path), BadImages("skip", tmp_path, total=10_000)
    plain = list(loader(split).batches(1))
    away = Path(split.train[0].path)
    data, modified = away.read_bytes(), away.stat().st_mtime_ns

    def put(content: bytes) -> None:  # by its size and time the same file
        away.write_bytes(content)
        os.utime(away, ns=(modified, modified))

    put(bytes(len(data)))
    both = [list(loader(split, cache="host", rank=rank, world_size=2, bad_images=bad).batches(1)) for rank in (0, 1)]
    cameras = {int(b.cameras[b.indices == 0][0]) for batches in both for b in batches if (b.indices == 0).any()}
    assert cameras == {split.train[2].camera}
    put(data)
    assert same(list(loader(split, cache="host").batches(1)), plain)
