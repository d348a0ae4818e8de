"""Files that turn bad during the run."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusionreid.dataloading import DataError, Record, Split, fallback_reader
from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.config import DataloaderConfig, InputConfig
from fusionreid.dataloading.fallback_reader import FallbackReader
from fusionreid.dataloading.index import FILE as INDEX
from fusionreid.dataloading.loader import TestLoader, TrainLoader
from tests.dataloading.test_bad_images import listed, make_split, spoil
from tests.dataloading.test_records import image_bytes

INPUT = InputConfig(SIZE_TRAIN=(32, 16), SIZE_TEST=(32, 16))


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return make_split(tmp_path)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(fallback_reader, "time", SimpleNamespace(sleep=waited.append))
    return waited


def test_a_file_that_comes_back_is_waited_for(split, waits):
    answers = iter([DataError("away"), DataError("away"), torch.ones(1)])

    def decode(path: str) -> torch.Tensor:
        answer = next(answers)
        if isinstance(answer, DataError):
            raise answer
        return answer

    assert FallbackReader(split.train, decode)([4]).tolist() == [[1]]
    assert waits == [0.1, 0.5]


@pytest.mark.parametrize(
    ("backend", "workers", "cache"),
    [("torchvision", 0, "none"), ("torchvision", 2, "none"), ("torchvision", 0, "host"), ("dali", 1, "none")],
)
def test_a_file_turns_bad_in_the_middle(split, tmp_path, waits, caplog, backend, workers, cache):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    bad = BadImages("skip", tmp_path)
    used = bad.check(split)
    position, png = 11, image_bytes("PNG")
    spoil(split.train[position], png[:9000] + bytes(2000) + png[11000:])  # with its end, as the index wants it
    loading = DataloaderConfig(NUM_WORKERS=workers, NUM_INSTANCE=4, BACKEND=backend, CACHE=cache)
    train = TrainLoader(used, INPUT, loading, batch_size=32, seed=1, bad_images=bad)
    assert len(list(train.batches(0))) == train.steps(0)
    train.close()
    assert waits == [0.1, 0.5, 2.0]
    line = {"part": "train", "path": split.train[position].path, "replacement": split.train[position + 16].path}
    assert [{key: found[key] for key in line} for found in listed(tmp_path)] == [line]
    assert caplog.text.count("replaces it") == 1
    again = BadImages("skip", tmp_path).check(split)  # the next start knows, and replaces it by the same
    assert again.train[position] == split.train[position + 16]


def test_with_error_the_run_ends_and_the_file_is_named(split, tmp_path, waits):
    bad = BadImages("error", tmp_path)
    bad.check(split)
    path = spoil(split.train[8])
    loading = DataloaderConfig(NUM_WORKERS=0, NUM_INSTANCE=4, CACHE="none")
    train = TrainLoader(split, INPUT, loading, batch_size=32, seed=1, bad_images=bad)
    with pytest.raises(DataError, match=f"^cannot read the image {path}: .*or set DATASETS.ON_BAD skip$"):
        list(train.batches(0))
    assert [line["path"] for line in listed(tmp_path)] == [path]
    spoil(split.query[0])
    test = TestLoader(split.query, INPUT, DataloaderConfig(NUM_WORKERS=0), batch_size=8)
    with pytest.raises(DataError, match=r"^cannot read the image .*query_0.jpg: "):
        list(test)


def test_too_many_turn_bad(split, tmp_path, waits):
    bad = BadImages("skip", tmp_path)
    bad.check(split)
    for record in split.train[:3]:
        spoil(record)

    def decode(path: str) -> torch.Tensor:
        if os.stat(path).st_nlink == 1:
            raise DataError("spoilt")
        return torch.ones(1)

    reader = FallbackReader(split.train, decode, bad)
    assert len(reader([0, 1, 9])) == 3
    assert reader.replacements == {0: 16, 1: 17}
    with pytest.raises(
        DataError, match=r"^3 of 2,000 image files cannot be used:\n  .*train_2.jpg: spoilt\n  and 2 more"
    ):
        reader([2])
    assert [line["path"] for line in listed(tmp_path)] == [record.path for record in split.train[:3]]


def test_a_replacement_that_turns_bad_is_replaced_in_turn(split, tmp_path, waits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad, gone = BadImages("skip", tmp_path, total=10_000), set()

    def decode(path: str) -> torch.Tensor:
        if path in gone:
            raise DataError("spoilt")
        return torch.tensor([float(path.split("_")[-1][:-4])])

    reader = FallbackReader(split.train, decode, bad)
    for expected in (0, 16, 32):
        assert reader([0]).item() == expected
        gone.add(split.train[expected].path)
    assert not (tmp_path / INDEX).exists()  # nothing was checked: there is no index to put it in


def test_a_replacement_brings_its_camera(split, tmp_path, waits):
    records = tuple(Record(r.path, r.person, int(i != 11)) for i, r in enumerate(split.train))
    loading = DataloaderConfig(NUM_WORKERS=0, NUM_INSTANCE=4, CACHE="none")
    bad = BadImages("skip", tmp_path, total=10_000)
    train = TrainLoader(replace(split, train=records), INPUT, loading, batch_size=32, seed=1, bad_images=bad)
    os.unlink(records[11].path)
    cameras = [camera for batch in train.batches(0) for camera in batch.cameras[batch.indices == 11].tolist()]
    assert cameras == [1]
    assert [(line["reason"], line["replacement"]) for line in listed(tmp_path)] == [
        ("No such file or directory", records[19].path)
    ]
