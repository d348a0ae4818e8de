"""Drop path: a rate that holds, draws that belong to an image wherever it is computed, and torch's own without them."""

import torch
from torch import nn

from fusionreid.backbones.vit import build_vit
from fusionreid.blocks import Block
from fusionreid.drop_path import Draws, DropPath

STEP = torch.tensor(7)


def model(layers: int = 3) -> nn.Sequential:
    return nn.Sequential(*(DropPath(0.1 * (1 + layer)) for layer in range(layers)))


def drawn(images: torch.Tensor, step: torch.Tensor = STEP, seed: int = 3) -> torch.Tensor:
    draws = Draws(model(), seed, images)
    draws.draw(step)
    return draws.factors


def test_rates_hold_and_the_mean_is_kept() -> None:
    factors = drawn(torch.arange(40000))
    for layer, rate in enumerate((0.1, 0.2, 0.3)):
        assert set(factors[layer].unique().tolist()) == {0.0, (1 / torch.tensor(1 - rate)).item()}
        assert abs((factors[layer] == 0).float().mean().item() - rate) < 0.01
    together = ((factors[0] == 0) & (factors[1] == 0)).float().mean().item()
    assert abs(together - 0.02) < 0.005


def test_a_draw_belongs_to_step_seed_and_image_alone() -> None:
    whole = drawn(torch.arange(64))
    assert torch.equal(drawn(torch.arange(32, 64)), whole[:, 32:])
    assert not torch.equal(drawn(torch.arange(64), STEP + 1), whole)
    assert not torch.equal(drawn(torch.arange(64), seed=4), whole)


def test_a_chunk_sees_its_own_factors_in_training_only() -> None:
    layers = model()
    draws = Draws(layers, 3, torch.arange(64))
    draws.draw(STEP)
    draws.show(slice(16, 48))
    x = torch.randn(32, 5, 2)
    torch.testing.assert_close(layers[1](x), x * draws.factors[1, 16:48, None, None])
    assert layers.eval()[1](x) is x


def test_the_branches_of_a_block_have_draws_of_their_own() -> None:
    block = Block(8, 2, qkv_bias=False, norm_eps=1e-5, drop_path=0.5)
    draws = Draws(block, 3, torch.arange(64))
    draws.draw(STEP)
    draws.show(slice(None))
    x, (first, second) = torch.randn(64, 5, 8), draws.factors[:, :, None, None]
    y = x + first * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), y + second * block.mlp(block.norm2(y)))


def test_every_drop_path_of_a_timm_model_is_ours() -> None:
    vit = build_vit("test_vit", image_size=(32, 16), stride=(16, 16), drop_path=0.2)
    kinds = {type(module) for name, module in vit.named_modules() if "drop_path" in name}
    assert kinds == {DropPath, nn.Identity}  # the first block's rate is 0
    assert len(Draws(vit, 0, torch.arange(2)).layers) == 2 * (len(vit.blocks) - 1)
