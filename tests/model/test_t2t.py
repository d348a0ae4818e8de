"""T2T-ViT against the recorded numbers, its position table and grids."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fusionreid.backbones.t2t import T2TViT, TokenTransformer, build_t2t, sinusoid
from tests.model.test_vit import check_tokens, filled
from tests.numerics import FIXTURES, assert_close
from tests.recorded import check_case


def test_token_transformer_equals_the_recorded_numbers() -> None:
    block = TokenTransformer(147, 64)
    check_case("modules/token_transformer", block, lambda x: block(x))


def test_t2t_equals_the_recorded_numbers() -> None:
    model = T2TViT(96, 2, 4, image_size=(256, 128), num_cameras=6)
    check_tokens(
        "modules/t2t_tiny", model, partial(re.sub, "patch_embed", "tokens_to_token"), left_alone=("pos_embed",)
    )


@pytest.mark.parametrize("width", [96, 384, 512])
def test_position_table_equals_the_recorded_one(width: int) -> None:
    with np.load(FIXTURES / "modules/sinusoid.npz") as tables:
        assert_close("table", sinusoid(129, width).float(), tables[f"n129_d{width}"], 1e-7)


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads"), [("t2t_vit_t_14", 384, 14, 6), ("t2t_vit_t_24", 512, 24, 8)]
)
def test_published_types(name: str, width: int, depth: int, heads: int) -> None:
    with torch.device("meta"):
        model = build_t2t(name, image_size=(256, 128), drop_path=0.1)
    assert (model.width, model.grid, len(model.blocks)) == (width, (16, 8), depth)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert model.blocks[0].attn.heads == heads
    assert all(module.eps == 1e-5 for module in model.modules() if isinstance(module, nn.LayerNorm))
    assert not any(name.endswith("qkv.bias") for name, _ in model.named_parameters())


@pytest.mark.parametrize(("image_size", "grid"), [((64, 32), (4, 2)), ((384, 128), (24, 8)), ((100, 70), (7, 5))])
def test_any_image_size(image_size: tuple[int, int], grid: tuple[int, int]) -> None:
    model = T2TViT(96, 1, 4, image_size=image_size)
    assert model.grid == grid
    assert model(torch.zeros(1, 3, *image_size)).shape == (1, 1 + grid[0] * grid[1], 96)


def test_positions_are_fixed_and_survive_meta_building() -> None:
    with torch.device("meta"):
        model = T2TViT(96, 1, 4, image_size=(64, 32), num_cameras=6)
    assert all(torch.isfinite(tensor).all() for tensor in filled(model))
    assert_close("table", model.pos_embed, sinusoid(9, 96), 1e-7)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]
