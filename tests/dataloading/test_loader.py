from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fusionreid.dataloading import DataError, Split, read_split
from fusionreid.dataloading.config import DataloaderConfig, DatasetsConfig, InputConfig
from fusionreid.dataloading.decode import BICUBIC, BILINEAR, decode_batch
from fusionreid.dataloading.loader import Batch, TestLoader, TrainLoader
from fusionreid.kernels import reference
from fusionreid.kernels.augmentation import normalize

INPUT = InputConfig(SIZE_TRAIN=(32, 16), SIZE_TEST=(24, 16), PADDING=3)


def make_split(root: Path) -> Split:
    rng = np.random.default_rng(0)
    for folder, persons in (
        ("bounding_box_train", range(10, 16)),
        ("query", range(3)),
        ("bounding_box_test", range(4)),
    ):
        (root / folder).mkdir()
        for person in persons:
            for i in range(5):
                noise = Image.fromarray(rng.integers(0, 256, (40, 20, 3), dtype=np.uint8))
                noise.save(root / folder / f"{person:04}_c{i % 2 + 1}_{i}.jpg")
    return read_split(DatasetsConfig(NAMES="market", ROOT_DIR=str(root)))


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    return make_split(tmp_path_factory.mktemp("market"))


def loader(
    split: Split, workers: int = 0, backend: str = "auto", cache: str = "none", **changes: object
) -> TrainLoader:
    settings = {"batch_size": 8, "seed": 5} | changes
    loading = DataloaderConfig(NUM_WORKERS=workers, NUM_INSTANCE=2, BACKEND=backend, CACHE=cache)
    return TrainLoader(split, INPUT, loading, **settings)


@pytest.fixture(scope="module")
def working(split) -> Iterator[TrainLoader]:
    train = loader(split, workers=2)
    yield train
    train.close()


def test_dali_augments_as_the_kernel_does(split):
    pytest.importorskip("nvidia.dali", reason="DALI is an extra")
    batches = []
    for way in ("kernel", "dali"):
        loading = DataloaderConfig(NUM_WORKERS=1, NUM_INSTANCE=2, BACKEND="dali", CACHE="none", AUGMENT=way)
        train = TrainLoader(split, INPUT, loading, batch_size=8, seed=5)
        batches.append([*train.batches(3), *train.batches(4, 1)])
        train.close()
    assert len(batches[0]) == len(batches[1]) == 4
    for a, b in zip(*batches):
        torch.testing.assert_close(b.images, a.images, rtol=0, atol=2e-6)
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("persons", "cameras", "indices"))


def worker_pids(train: TrainLoader) -> list[int]:
    return [process.pid for process in train._source._loader._iterator._workers]


def same(a: list[Batch], b: list[Batch]) -> bool:
    pairs = [pair for x, y in zip(a, b) for pair in zip(vars(x).values(), vars(y).values())]
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in pairs)


def test_a_batch_is_the_plan_carried_out(split):
    train = loader(split)
    plan, batches = train.plan(3), list(train.batches(3))
    assert len(batches) == train.steps(3) == plan.num_steps > 1
    for step, batch in enumerate(batches):
        part = plan.rank_slice(step, 0, 1)
        records = [split.train[i] for i in plan.image[part]]
        expected = reference.augment(
            decode_batch([record.path for record in records], (32, 16), BICUBIC),
            *(torch.from_numpy(array[part]) for array in (plan.flip, plan.shift, plan.erase)),
            torch.arange(part.start, part.stop),
            seed=5,
            epoch=3,
            mean=INPUT.PIXEL_MEAN,
            std=INPUT.PIXEL_STD,
        )
        assert torch.allclose(batch.images, expected, rtol=0, atol=2e-7)  # an ulp of values up to 1, noise up to 4.2
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert [split.persons[label] for label in batch.persons] == [record.person for record in records]
        assert batch.cameras.tolist() == [record.camera for record in records]
        assert batch.indices.tolist() == plan.image[part].tolist()


def test_workers_change_nothing_and_serve_all_epochs(split, working):
    alone = loader(split)
    assert same(list(working.batches(0)), list(alone.batches(0)))
    pids = worker_pids(working)
    next(working.batches(1))  # left in the middle
    assert same(list(working.batches(1)), list(alone.batches(1)))
    assert same(list(working.batches(1, start_step=1)), list(alone.batches(1))[1:])
    assert list(working.batches(1, start_step=alone.steps(1))) == []
    assert worker_pids(working) == pids


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_have_the_same_batch(split, world_size):
    whole = list(loader(split).batches(0))
    parts = [list(loader(split, rank=rank, world_size=world_size).batches(0)) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part[step].indices for part in parts]), batch.indices)


def test_the_models_random_numbers_are_untouched(split, working):
    before = torch.get_rng_state()
    for train in (working, loader(split)):
        list(train.batches(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_named(split, workers, tmp_path):
    bad = tmp_path / "bad.jpg"
    data = Path(split.train[0].path).read_bytes()
    bad.write_bytes(data[: len(data) // 2])
    records = [split.query[0], type(split.query[0])(str(bad), 1, 0), split.query[1]]
    test = TestLoader(records, INPUT, DataloaderConfig(NUM_WORKERS=workers), batch_size=1)
    batches = iter(test)
    next(batches)
    with pytest.raises(DataError, match=r"^cannot read the image .*bad\.jpg: ") as caught:
        next(batches)
    assert "Traceback" not in str(caught.value)


def test_evaluation_takes_every_image_once_in_order(split):
    records = (*split.query, *split.gallery)
    test = TestLoader(records, INPUT, DataloaderConfig(NUM_WORKERS=0), batch_size=8)
    for batches in (list(test), list(test)):
        assert len(batches) == len(test) == 5
        assert [len(batch.images) for batch in batches] == [8, 8, 8, 8, 3]
        assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(35))
        assert torch.cat([batch.persons for batch in batches]).tolist() == [record.person for record in records]
        assert torch.cat([batch.cameras for batch in batches]).tolist() == [record.camera for record in records]
    pixels = decode_batch([record.path for record in records[-3:]], (24, 16), BILINEAR)
    assert torch.equal(batches[-1].images, normalize(pixels, INPUT.PIXEL_MEAN, INPUT.PIXEL_STD))


def test_a_batch_that_does_not_fit_is_refused(split):
    with pytest.raises(DataError, match="each of 3 processes takes whole persons"):
        loader(split, world_size=3)
    with pytest.raises(DataError, match="6 persons to train on, a batch needs 7"):
        loader(split, batch_size=14)


def test_a_closed_loader_says_so(split):
    train = loader(split)
    train.close()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(train.batches(0))
