"""Where the model looks: the attention of the last fusion, on the right branch's grid, and Grad-CAM of the CNN."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fusionreid import FusionReID
from fusionreid.dataloading import read_split
from fusionreid.dataloading.loader import TestLoader
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import Config, load_config
from fusionreid.engine.distributed import parallel
from fusionreid.engine.reporting import attention
from fusionreid.engine.reporting.attention import BY_CNN, BY_TRANSFORMER, GRAD_CAM, attention_maps, grad_cam
from fusionreid.kernels import ClassStream, dual_cross_attention
from fusionreid.kernels.reference import class_attention_weights
from tests.runs import arguments


def made(tmp_path: Path, **keys: object) -> tuple[Config, FusionReID]:
    """3 x 1 patches of the Transformer, 2 x 1 of the CNN."""
    _, path, *overrides = arguments(tmp_path, tmp_path, MODEL__STRIDE_SIZE="(8, 16)", **keys)
    cfg = load_config(path, overrides)
    torch.manual_seed(5)
    return cfg, build(cfg, 4, 2)


@pytest.mark.parametrize(("mode", "share"), [(0, "encoder"), (0, "all"), (2, "encoder"), (3, "encoder")])
def test_maps_weigh_the_patches_of_the_last_fusion(tmp_path: Path, mode: int, share: str) -> None:
    cfg, model = made(tmp_path, MODEL__HTM_MODE=mode, MODEL__HTM_SHARE=share)
    streams: list[ClassStream] = []
    for unit in model.htm.layers[-1].fusions:
        unit.attn.q.weight.data.mul_(100)  # attention of a fresh model is flat
        unit.attn.register_forward_hook(lambda _, __, stream: streams.append(stream))
    maps = attention_maps(model, read_split(cfg.DATASETS).query[:4], (0, 1), cfg, parallel.start("cpu"))
    assert [(what, of_branch.shape) for what, of_branch in maps.items()] == [
        (BY_CNN, (4, 3, 1)),
        (BY_TRANSFORMER, (4, 2, 1)),
    ]
    for of_branch, stream in zip(maps.values(), streams, strict=True):
        weights = class_attention_weights(stream)
        values = (stream.tokens @ stream.value_weight.T).unflatten(2, stream.query.shape[1:])
        context = torch.einsum("bnh,bnhd->bhd", weights, values).flatten(1)
        torch.testing.assert_close(context, dual_cross_attention(stream))
        torch.testing.assert_close(of_branch.flatten(1), weights.mean(2))
        assert of_branch.flatten(1).std(1).min() > 1e-3


@pytest.mark.parametrize("keys", [{"MODEL__TRANS_USE": "no"}, {"MODEL__RES_USE": "no"}, {"MODEL__HTM_MODE": 1}])
def test_a_model_that_fuses_nothing_has_no_maps(tmp_path: Path, keys: dict[str, object]) -> None:
    cfg, model = made(tmp_path, **keys)
    records = read_split(cfg.DATASETS).query[:1]
    assert attention_maps(model, records, (0, 1), cfg, parallel.start("cpu")) == {}


def test_grad_cam_weighs_the_map_by_its_mean_gradient(tmp_path: Path) -> None:
    """Against autograd: weights are the mean gradient of the likeness, the map their positive sum."""
    cfg, model = made(tmp_path)
    split, ranks = read_split(cfg.DATASETS), parallel.start("cpu")
    records, matches = split.query[:3], split.gallery[:3]
    maps = grad_cam(model, records, matches, cfg, ranks)
    (batch,) = TestLoader([*records, *matches], cfg.INPUT, cfg.DATALOADER, batch_size=6)
    assert model.cnn is not None
    feature_map = model.cnn(batch.images[:3])
    likeness = F.cosine_similarity(model.cnn_pool(feature_map), model.cnn_pool(model.cnn(batch.images[3:])).detach())
    (gradient,) = torch.autograd.grad(likeness.sum(), feature_map)
    expected = (gradient.mean((2, 3), keepdim=True) * feature_map).sum(1).relu()
    torch.testing.assert_close(maps[GRAD_CAM], expected.detach())
    assert maps[GRAD_CAM].max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_grad_cam_needs_a_cnn_and_captum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, model = made(tmp_path, MODEL__RES_USE="no")
    records, ranks = read_split(cfg.DATASETS).query[:1], parallel.start("cpu")
    assert grad_cam(model, records, records, cfg, ranks) == {}
    cfg, model = made(tmp_path)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert grad_cam(model, records, records, cfg, ranks) == {}
