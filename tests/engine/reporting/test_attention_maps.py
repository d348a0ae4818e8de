"""Where the model looks: the attention of the last fusion, on the right branch's grid, lit in the right place."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fusionreid import FusionReID
from fusionreid.dataloading import Record, read_split
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import Config, load_config
from fusionreid.engine.distributed import parallel
from fusionreid.engine.reporting.attention import DARKEST, LABEL, attention_maps, attention_sheet
from fusionreid.engine.reporting.rank_lists import GAP, MARGIN, THUMBNAIL
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
    assert maps is not None
    assert [of_branch.shape for of_branch in maps] == [(4, 3, 1), (4, 2, 1)]
    for of_branch, stream in zip(maps, streams, strict=True):
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
    assert attention_maps(model, records, (0, 1), cfg, parallel.start("cpu")) is None


def test_an_image_is_lit_where_it_is_attended_to(tmp_path: Path) -> None:
    records = [Record(str(tmp_path / f"{i}.png"), i, 0) for i in range(2)]
    for record in records:
        Image.new("RGB", (64, 128), (200, 100, 50)).save(record.path)
    top, bottom = torch.zeros(2, 4, 2), torch.zeros(2, 8, 2)
    top[:, 0, 0], bottom[:, 7, 1] = 0.4, 0.02  # of one map each image's own largest value counts
    sheet = attention_sheet(records, (top, bottom))
    width, height = THUMBNAIL
    for column in range(2):
        for row, (bright, dark) in enumerate([((1, 1), (-2, -2)), ((1, 1), (-2, -2)), ((-2, -2), (1, 1))]):
            left, upper = MARGIN + LABEL + column * (width + GAP), MARGIN + row * (height + GAP)
            at = [sheet.getpixel((left + x % width, upper + y % height)) for x, y in (bright, dark)]
            assert at[0] == (200, 100, 50)
            assert at[1] == (tuple(round(DARKEST * v) for v in at[0]) if row else at[0])
