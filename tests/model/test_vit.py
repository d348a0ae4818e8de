"""ViT against the recorded numbers, grids, camera embedding, and timm ViTs by name."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fusionreid.backbones.vit import TimmAttention, ViT, build_vit, from_timm
from tests.numerics import assert_close, load_case
from tests.recorded import EXACT, STORED, assert_gradient_summary, fill

TINY = {"embed_dim": 96, "depth": 2, "num_heads": 4, "num_classes": 0}


def tiny(stride: int = 12, scale: float | None = None, sie: dict[str, Any] | None = None, **source: Any) -> ViT:
    size = source.pop("size", (64, 32))
    model = source.pop("kind", VisionTransformer)(**TINY | source)
    return from_timm(model, image_size=size, stride=(stride, stride), scale=scale, **sie or {})


def build(name: str, drop_path: float = 0.0) -> ViT:
    with torch.device("meta"):
        return build_vit(name, image_size=(256, 128), stride=(12, 12), drop_path=drop_path)


def check_tokens(
    path: str, model: ViT, published: Callable[[str], str] = str, left_alone: tuple[str, ...] = ()
) -> None:
    """Tokens and all gradients of a backbone with the made-up weights; entries it lacks must be unused ones."""
    case, arrays = load_case(path)
    kept = {name: model.state_dict()[name].clone() for name in left_alone}
    fill(model, published).eval().load_state_dict(kept, strict=False)
    images = torch.from_numpy(arrays["in/x"]).double().requires_grad_()
    cameras = next((torch.from_numpy(arrays[name]) for name in ("in/cam", "in/view") if name in arrays), None)
    tokens = model(images, cameras)
    assert_close("tokens", tokens.detach(), arrays["eval_f64/out0"], EXACT)
    tokens.backward(torch.from_numpy(arrays["in/upstream0"]).double())
    assert_close("gradient of the images", images.grad, arrays["eval_f64/grad_in/x"], STORED)
    gradients = {published(name): parameter.grad for name, parameter in model.named_parameters()}
    for name, summary in case["grad_eval_f64"].items():
        gradient = gradients.pop(name, None)
        assert_gradient_summary(name, gradient, summary)
        if f"eval_f64/grad/{name}" in arrays and summary[0] > EXACT:
            assert_close(f"gradient of {name}", gradient, arrays[f"eval_f64/grad/{name}"], STORED)
    assert not gradients


SIE = {"nosie": {}, "cam": {"num_cameras": 6}, "view": {"num_cameras": 4, "sie_weight": 1.5}}  # a view is as a camera


@pytest.mark.parametrize(("case", "sie"), SIE.items())
def test_vit_equals_the_recorded_numbers(case: str, sie: dict[str, float]) -> None:
    check_tokens(f"modules/trans_tiny_{case}", tiny(sie=sie))


def test_small_vit_equals_the_recorded_numbers() -> None:
    model = tiny(16, 96**-0.5, {"num_cameras": 6}, num_heads=8, mlp_ratio=3.0, qkv_bias=False)
    check_tokens("modules/trans_tiny_s16_small_style", model)


PUBLISHED = {  # width, depth, heads, MLP width, scale of the attention, bias of its projection
    "vit_base_patch16_224": (768, 12, 12, 3072, None, True),
    "deit_base_patch16_224_TransReID": (768, 12, 12, 3072, None, True),
    "vit_small_patch16_224": (768, 8, 8, 2304, 768**-0.5, False),
    "deit_small_patch16_224": (384, 12, 6, 1536, None, True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_types(name: str) -> None:
    width, depth, *settings = PUBLISHED[name]
    model = build(name, drop_path=0.1)
    assert (model.width, len(model.blocks), model.grid) == (width, depth, (21, 10))
    rates = [block.drop_path1.drop_prob for block in list(model.blocks)[1:]]
    assert rates == pytest.approx([0.1 * i / (depth - 1) for i in range(1, depth)])
    for block in model.blocks:
        attention, hidden = block.attn, block.mlp.fc1.out_features
        assert [attention.heads, hidden, attention.scale, attention.qkv.bias is not None] == settings
        assert block.norm1.eps == model.norm.eps == 1e-6


GRIDS = [((256, 128), 12, (21, 10)), ((256, 128), 16, (16, 8)), ((384, 128), 12, (31, 10)), ((224, 224), 14, (15, 15))]


@pytest.mark.parametrize(("image_size", "stride", "grid"), GRIDS)
def test_grid_follows_from_size_and_stride(image_size: tuple[int, int], stride: int, grid: tuple[int, int]) -> None:
    model = tiny(stride, size=image_size)
    assert model.grid == grid
    assert model(torch.zeros(1, 3, *image_size)).shape == (1, 1 + grid[0] * grid[1], 96)


BY_NAME = ("deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_clip_224")
ROTARY = ("vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3", "eva02_tiny_patch14_224")


@pytest.mark.parametrize("name", BY_NAME + ROTARY)
def test_timm_vit_by_name_equals_timm(name: str) -> None:
    """At its own size and stride every timm ViT is what timm computes, registers left out."""
    options: dict[str, Any] = {"num_classes": 0, "depth": 2, "dynamic_img_size": False}
    source = timm.create_model(name, img_size=(112, 56), **options).double().eval()
    stride = source.patch_embed.patch_size
    model = from_timm(timm.create_model(name, **options), image_size=(112, 56), stride=stride).double().eval()
    state = {entry: value + torch.randn_like(value) / 10 for entry, value in source.state_dict().items()}
    source.load_state_dict(state)
    model.load_state_dict({entry.replace("fc_norm", "norm"): value for entry, value in state.items()})
    assert all(isinstance(block.attn, TimmAttention) == (name in BY_NAME) for block in model.blocks)
    images = torch.randn(2, 3, 112, 56, dtype=torch.float64)
    expected, tokens = source.fc_norm(source.forward_features(images)).detach(), model(images).detach()
    assert_close("class token", tokens[:, 0], expected[:, 0], EXACT)
    assert_close("patches", tokens[:, 1:], expected[:, source.num_prefix_tokens :], EXACT)


def test_rotary_positions_are_those_of_the_overlapping_grid() -> None:
    model = build("vit_small_patch16_dinov3")
    assert (model.grid, model.rope.get_embed().shape) == ((21, 10), (210, 2 * 64))
    assert model(torch.empty(2, 3, 256, 128, device="meta")).shape == (2, 211, 384)


def test_unknown_camera_gets_the_mean_embedding() -> None:
    model = tiny(sie={"num_cameras": 6}).eval()
    images = torch.randn(1, 3, 64, 32)
    unknown = model(images, torch.tensor([-1]))
    model.sie_embed.data[:] = model.sie_embed.data.mean(0)
    assert_close("tokens", unknown.detach(), model(images, torch.tensor([3])).detach(), 1e-6)
    assert tiny(sie={"num_cameras": 1}).sie_embed is None


WRONG = {
    "vit_base_patch16_225": "of timm",
    "swin_tiny_patch4_window7_224": "of timm",
    "vit_base_r50_s16_224": "patches from one convolution",
    "vit_base_patch16_siglip_224": "class token",
    "vit_small_patch16_rope_mixed_224": "fixed rotary positions",
}


@pytest.mark.parametrize(("name", "rule"), WRONG.items())
def test_wrong_name_is_refused(name: str, rule: str) -> None:
    with pytest.raises(ValueError, match=f"TRANSFORMER_TYPE must be a .*{rule}"):
        build(name)


def test_wrong_input_is_refused() -> None:
    model = tiny(sie={"num_cameras": 6})
    with pytest.raises(ValueError, match=r"\(64, 32\), got \(32, 64\)"):
        model(torch.zeros(1, 3, 32, 64), torch.tensor([0]))
    with pytest.raises(ValueError, match="6 cameras"):
        model(torch.zeros(1, 3, 64, 32))


def filled(model: ViT) -> list[Tensor]:
    """The entries and buffers of a meta-built backbone after `to_empty` and `reset_parameters`."""
    model = model.to_empty(device="cpu")
    for tensor in (*model.state_dict().values(), *model.buffers()):
        tensor.fill_(float("nan"))
    model.reset_parameters()
    return [*model.state_dict().values(), *model.buffers()]


REGISTERS = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1.0, "pre_norm": True}
DINOV3 = {"kind": Eva, "num_reg_tokens": 4, "init_values": 1.0, "use_rot_pos_emb": True, "rope_type": "dinov3"}


@pytest.mark.parametrize("extras", [{}, REGISTERS, DINOV3])
def test_meta_built_weights_are_all_filled(extras: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = tiny(sie={"num_cameras": 60}, **extras)
    assert all(torch.isfinite(tensor).all() for tensor in filled(model))
    for table in (model.pos_embed, model.sie_embed, model.blocks[0].attn.qkv.weight):
        assert table.std().item() == pytest.approx(0.02, rel=0.15)
    fresh = dict(tiny(**extras).named_buffers())
    assert all(torch.equal(value, fresh[name]) for name, value in model.named_buffers())
