"""Every way to pixels trains on the same samples; and which way is taken."""

import sys
from importlib.util import find_spec

import pytest
import torch

from fusionreid.dataloading import read_split
from fusionreid.dataloading.config import DataloaderConfig, DatasetsConfig, InputConfig, SyntheticConfig
from fusionreid.dataloading.image_source import backend
from fusionreid.dataloading.loader import TestLoader, TrainLoader
from fusionreid.dataloading.records import DataError

try:
    HAS_DALI = find_spec("nvidia.dali") is not None
except ModuleNotFoundError:
    HAS_DALI = False
DECODERS = ["torchvision", *(["dali"] if HAS_DALI else [])]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
INPUT = InputConfig(RE_PROB=0.5)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    rendered = SyntheticConfig(PERSONS=4, TEST_PERSONS=2, CAMERAS=2, IMAGES=2)
    root = str(tmp_path_factory.mktemp("rendered"))
    return read_split(DatasetsConfig(NAMES="synthetic", ROOT_DIR=root, SYNTHETIC=rendered))


def grey_levels(images, others) -> torch.Tensor:
    return torch.cat([(a.images - b.images).abs().flatten() for a, b in zip(images, others, strict=True)]) * 255 / 2


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("cache", ["none", "host"])
def test_every_way_trains_on_the_same_samples(split, decoder, cache):
    def batches(how: dict[str, str]):
        loading = DataloaderConfig(NUM_WORKERS=0, NUM_INSTANCE=2, **how)
        train = TrainLoader(split, INPUT, loading, batch_size=4, seed=3)
        return train.plan(1), list(train.batches(1))

    plan, expected = batches({"BACKEND": "torchvision", "CACHE": "none"})
    assert plan.erase.any()  # its noise is compared as well
    ours, got = batches({"BACKEND": decoder, "CACHE": cache})
    assert all((a == b).all() for a, b in zip(vars(ours).values(), vars(plan).values(), strict=True) if a is not b)
    for one, other in zip(got, expected, strict=True):
        for name in ("persons", "cameras", "indices"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    difference = grey_levels(got, expected)
    assert difference.max() <= (2.001 if decoder == "dali" else 0)
    assert difference.mean() <= 0.3


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_evaluates_the_same_images(split, decoder):
    records = (*split.query, *split.gallery)

    def batches(name: str):
        return list(TestLoader(records, INPUT, DataloaderConfig(NUM_WORKERS=0, BACKEND=name), batch_size=5))

    got, expected = batches(decoder), batches("torchvision")
    assert [len(batch.images) for batch in got] == [5] * (len(records) // 5) + [len(records) % 5]
    assert torch.cat([batch.indices for batch in got]).tolist() == list(range(len(records)))
    difference = grey_levels(got, expected)
    assert difference.max() <= (2.001 if decoder == "dali" else 0)
    assert difference.mean() <= 0.3


def test_which_decoder_is_taken(monkeypatch, caplog):
    jpegs, others = ["a.jpg", "b.JPEG"] * 50, ["c.png"] * 2
    auto, dali = DataloaderConfig(), DataloaderConfig(BACKEND="dali")
    monkeypatch.setitem(sys.modules, "fusionreid.dataloading.dali", sys)  # can be imported
    assert backend(auto, jpegs, CPU) == "torchvision"
    assert backend(auto, jpegs, GPU) == "dali"
    assert backend(auto, jpegs + others, GPU) == "torchvision"
    assert backend(dali, others, CPU) == "dali"
    assert backend(DataloaderConfig(BACKEND="torchvision"), jpegs, GPU) == "torchvision"
    monkeypatch.setitem(sys.modules, "fusionreid.dataloading.dali", None)  # cannot
    assert backend(auto, jpegs, GPU) == "torchvision"
    assert "DALI cannot be used, processes decode on the CPU" in caplog.text
    with pytest.raises(DataError, match=r"BACKEND dali: DALI cannot be used: .*pip install nvidia-dali-cuda130"):
        backend(dali, jpegs, CPU)
