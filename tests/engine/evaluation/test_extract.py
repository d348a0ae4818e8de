"""Features from images: one shape for the model, what is compiled, who reads the files, and non-finite rows."""

from functools import partialmethod
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fusionreid.dataloading.loader import TestLoader
from fusionreid.dataloading.records import Record
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.evaluation.extract import embed, embedded_batches, images_of, own_rows, store
from fusionreid.engine.evaluation.finite import NonFiniteError
from fusionreid.model import Outputs
from tests.ranks import config


class Recorder(nn.Module):
    """A model whose feature of an image is its mean, and its camera; keeps the shapes it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor, cameras: Tensor) -> Outputs:
        assert images.is_contiguous(memory_format=torch.channels_last)
        self.shapes.append((*images.shape, len(cameras)))
        feature = torch.stack([images.mean((1, 2, 3)), cameras.float()], 1)
        return Outputs((feature,), (feature,), (feature,))


@pytest.fixture
def records(tmp_path: Path) -> tuple[Record, ...]:
    """Eleven images of brightness 0, 10, 20, ..."""
    for i in range(11):
        Image.new("RGB", (16, 32), (10 * i,) * 3).save(tmp_path / f"{i:02}.png")
    return tuple(Record(str(tmp_path / f"{i:02}.png"), i, i % 3) for i in range(11))


def evaluation(**test: object) -> Config:
    cfg = config().model_dump()
    cfg["TEST"] |= {"IMS_PER_BATCH": 4, "FEAT_NORM": False, **test}
    cfg["DATALOADER"]["NUM_WORKERS"] = 0
    return Config.from_dict(cfg)


def loader(records: tuple[Record, ...], cfg: Config) -> TestLoader:
    return images_of(records, cfg, parallel.start("cpu"))


def test_the_model_sees_one_shape_and_the_last_rows_are_cut(records: tuple[Record, ...]) -> None:
    """A smaller last batch would be compiled, or tuned, once more."""
    cfg, model = evaluation(), Recorder()
    cfg = cfg.model_copy(update={"PARALLEL": cfg.PARALLEL.model_copy(update={"COMPILE": "blocks"})})
    images, ranks = loader(records, cfg), parallel.start("cpu")
    assert [len(batch.images) for batch in images] == [4, 4, 3]
    batches = list(embedded_batches(model, images, (0, 1), cfg, ranks.device))
    assert model.shapes == [(4, 3, 32, 16, 4)] * 3
    assert [len(vectors) for vectors in batches] == [4, 4, 3]
    features = embed(model, images, (0, 1), cfg, ranks)
    assert torch.equal(features, torch.cat(batches))
    assert (features[:, 0].diff() > 0).all()
    assert features[:, 1].tolist() == [0, 1, -1] * 3 + [0, 1]  # camera 2 was not seen in training


@pytest.mark.parametrize("how", ["auto", "off"])
def test_nothing_is_computed_twice_where_no_shape_has_a_price(records: tuple[Record, ...], how: str) -> None:
    """65 images in batches of 64 are not 128 images on a CPU."""
    cfg, model = evaluation(), Recorder()
    cfg = cfg.model_copy(update={"PARALLEL": cfg.PARALLEL.model_copy(update={"COMPILE": how})})
    features = embed(model, loader(records, cfg), (0, 1), cfg, parallel.start("cpu"))
    assert model.shapes == [(4, 3, 32, 16, 4)] * 2 + [(3, 3, 32, 16, 3)]
    assert features[:, 1].tolist() == [0, 1, -1] * 3 + [0, 1]


def test_a_single_batch_is_not_padded(records: tuple[Record, ...]) -> None:
    cfg, model = evaluation(IMS_PER_BATCH=256), Recorder()
    embed(model, loader(records, cfg), (), cfg, parallel.start("cpu"))
    assert model.shapes == [(11, 3, 32, 16, 11)]


def test_an_evaluation_can_be_left_between_two_batches(records: tuple[Record, ...]) -> None:
    cfg, model = evaluation(), Recorder()

    def leave() -> None:
        if len(model.shapes) == 2:
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        embed(model, loader(records, cfg), (), cfg, parallel.start("cpu"), before_batch=leave)
    assert len(model.shapes) == 2


def test_stored_rows_that_are_not_finite_are_named_and_nothing_is_replaced(
    records: tuple[Record, ...], tmp_path: Path
) -> None:
    ranks, features = parallel.start("cpu"), torch.ones(11, 2)
    folder = tmp_path / "embeddings"
    store(folder, features.split(4), (11, 2), records, 0, {}, ranks)
    features[5, 1] = torch.inf
    with pytest.raises(NonFiniteError, match=r"of 1 of 11 images are not finite, the first: \[.*05.png"):
        store(folder, features.split(4), (11, 2), records, 0, {}, ranks)
    assert torch.equal(embeddings.load(folder).features, torch.ones(11, 2))


@pytest.mark.parametrize(("count", "world_size"), [(11, 1), (11, 3), (8, 4), (3, 8), (9, 8), (1, 2)])
def test_every_row_has_one_owner(count: int, world_size: int) -> None:
    ranks = parallel.start("cpu")
    shares = [own_rows(count, parallel.Ranks(rank, world_size, ranks.device, ranks.mesh)) for rank in range(world_size)]
    assert [row for share in shares for row in range(count)[share]] == list(range(count))


@pytest.mark.parametrize(("how", "expected"), [("auto", set()), ("blocks", {"Block", "HTMLayer", "GeM"}),
                                               ("whole", {"FusionReID"})])  # fmt: skip
def test_inference_is_compiled_as_the_configuration_says_and_never_sharded(
    how: str, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusionreid.engine.checkpoints.load_model import build

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    cfg = config(PARALLEL={"COMPILE": how})
    model = parallel.replicate(build(cfg, 4, 2), parallel.start("cpu"), cfg.PARALLEL)
    compiled = {type(part).__name__ for part in model.modules() if part._compiled_call_impl is not None}
    assert compiled >= expected
    assert bool(compiled) == bool(expected)
    assert not any(isinstance(part, torch.distributed.fsdp.FSDPModule) for part in model.modules())
