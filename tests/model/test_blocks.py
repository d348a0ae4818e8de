"""The Transformer block: its equation, dropout and drop path."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusionreid.blocks import Block, SelfAttention
from fusionreid.kernels import reference


def test_block_is_its_equation() -> None:
    block = Block(24, 3, mlp_ratio=3.0, qkv_bias=True, norm_eps=1e-6, scale=0.1).double()
    x = torch.randn(2, 7, 24, dtype=torch.double)
    qkv = block.attn.qkv(F.layer_norm(x, (24,), eps=1e-6)).reshape(2, 7, 3, 3, 8)
    y = x + block.attn.proj(reference.dual_self_attention(qkv, scale=0.1))
    y = y + block.mlp.fc2(F.gelu(block.mlp.fc1(F.layer_norm(y, (24,), eps=1e-6))))
    torch.testing.assert_close(block(x), y)
    assert block.mlp.fc1.out_features == 72


def test_drop_path_drops_each_branch_per_image_and_keeps_the_mean() -> None:
    block = Block(8, 1, qkv_bias=False, norm_eps=1e-6, drop_path=0.25)
    branch = block.drop_path1(torch.ones(20000, 3, 8))
    assert set(branch.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (branch == branch[:, :1, :1]).all()
    assert abs(branch.mean().item() - 1) < 0.02
    x = torch.randn(64, 5, 8)
    untouched = (block(x) == x).flatten(1).all(1).float().mean()  # both branches dropped: 1 in 16
    assert 0 < untouched < 0.25
    block.eval()
    torch.testing.assert_close(block(x), block(x), rtol=0, atol=0)


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(rate: str) -> None:
    block = Block(8, 2, qkv_bias=False, norm_eps=1e-6, **{rate: 0.5})
    plain = Block(8, 2, qkv_bias=False, norm_eps=1e-6)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 5, 8)
    assert not torch.equal(block(x), block(x))
    torch.testing.assert_close(block.eval()(x), plain(x))


def test_dropout_acts_at_every_place_of_its_own() -> None:
    block = Block(8, 2, qkv_bias=False, norm_eps=1e-6, dropout=0.5)
    calls: list[nn.Dropout] = []
    for module in block.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    for block.attn.attention_dropout in (0.0, 0.1):
        block(torch.randn(2, 5, 8))
        assert calls == [block.attn.drop, block.mlp.drop, block.mlp.drop]
        calls.clear()
    assert {module.p for module in (block.attn.drop, block.mlp.drop)} == {0.5}


def test_attention_with_dropout_is_the_same_attention() -> None:
    block = Block(24, 3, qkv_bias=True, norm_eps=1e-6, scale=0.1, attention_dropout=1e-12).double()
    x = torch.randn(2, 7, 24, dtype=torch.double)
    torch.testing.assert_close(block(x), block.eval()(x))


def test_width_must_hold_the_heads() -> None:
    with pytest.raises(ValueError, match="width 10 and 3 heads"):
        SelfAttention(10, 3, qkv_bias=False)
