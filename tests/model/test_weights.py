"""Pretrained backbones in the formats people have: what is loaded, resized, skipped and missing."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from fusionreid.backbones.resnet import ResNet, build_cnn
from fusionreid.backbones.t2t import T2TViT
from fusionreid.backbones.vit import ViT, from_timm
from fusionreid.config import ModelConfig
from fusionreid.model import FusionReID
from fusionreid.weights import WeightsError, load_imagenet, load_pretrained
from fusionreid.weights.formats import resize_positions

State = dict[str, Tensor]
CLIP = {"attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "fc1": "c_fc", "fc2": "c_proj", "norm1": "ln_1"}
CLIP |= {"norm2": "ln_2", "blocks": "transformer.resblocks", "norm_pre": "ln_pre", "cls_token": "class_embedding"}
CLIP |= {"pos_embed": "positional_embedding", "patch_embed.proj": "conv1", "norm.": "ln_post."}


def vit(depth: int = 1, **source: Any) -> ViT:
    model = VisionTransformer(embed_dim=96, depth=depth, num_heads=4, num_classes=0, **source)
    return from_timm(model, image_size=(64, 32), stride=(12, 12), num_cameras=6)


def random_state(model: nn.Module) -> State:
    return {name: torch.rand(tensor.shape) for name, tensor in model.state_dict().items()}


def assert_loaded(model: nn.Module, state: State, but: tuple[str, ...] = ()) -> None:
    for name, value in model.state_dict().items():
        assert name in but or torch.equal(value, state[name].to(value)), name


def test_resnet_of_torchvision(tmp_path: Path) -> None:
    state = random_state(TorchvisionResNet(Bottleneck, [1, 1, 1, 1]))
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}, "epoch": 3}, tmp_path / "resnet.pth")
    model = ResNet((1, 1, 1, 1))
    report = load_imagenet(model, tmp_path / "resnet.pth")
    assert (report.skipped, report.resized, report.missing) == (["module.fc.weight", "module.fc.bias"], [], [])
    assert_loaded(model, state)


def test_moco_into_a_timm_cnn_takes_the_trained_encoder(tmp_path: Path) -> None:
    trained = random_state(timm.create_model("resnet18", num_classes=0))
    entries = {f"module.encoder_{e}.{n}": t if e == "q" else -t for e in "kq" for n, t in trained.items()}
    torch.save({"state_dict": entries, "args": argparse.Namespace(lr=1)}, tmp_path / "moco.pth")
    model = build_cnn(1, "resnet18")
    report = load_imagenet(model, tmp_path / "moco.pth")
    assert_loaded(model.body, trained)
    assert len(report.skipped) == len(trained)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    "wrap", [dict, lambda s: {"teacher": {f"backbone.{n}": t for n, t in s.items()}, "student": {}}]
)
def test_vit_of_timm_deit_and_dino(tmp_path: Path, wrap: Callable[[State], State], distilled: bool) -> None:
    model, prefix = vit(), 1 + distilled
    state = random_state(model) | {"pos_embed": torch.rand(1, prefix + 196, 96)}
    del state["sie_embed"]
    extra = {"head.weight": torch.rand(10, 96)} | ({"dist_token": torch.rand(1, 1, 96)} if distilled else {})
    torch.save(wrap(state | extra), tmp_path / "vit.pth")
    report = load_imagenet(model, tmp_path / "vit.pth")
    assert (report.resized, report.missing) == (["pos_embed"], ["sie_embed"])
    assert {name.removeprefix("backbone.") for name in report.skipped} == extra.keys()
    table = torch.cat((state["pos_embed"][:, :1], state["pos_embed"][:, prefix:]), 1)
    state["pos_embed"] = resize_positions(table, 1, (14, 14), 1, (5, 2))
    assert_loaded(model, state, but=("sie_embed",))
    for text in ("1 resized (pos_embed)", "(sie_embed)", "head.weight"):
        assert text in report.describe()


def test_vit_of_clip(tmp_path: Path) -> None:
    model = vit(pre_norm=True)
    state = random_state(model)
    del state["sie_embed"]
    theirs = {"visual.proj": torch.rand(96, 64), "positional_embedding": torch.rand(77, 64)}
    for name, value in state.items():
        for ours, clip in CLIP.items():
            name = name.replace(ours, clip)
        theirs[f"visual.{name}"] = value.squeeze() if "embedding" in name else value
        if "resblocks" in name:
            theirs[name] = value[:64].clone()  # the text tower has the same names
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in theirs
    torch.save(theirs, tmp_path / "clip.pth")
    report = load_imagenet(model, tmp_path / "clip.pth")
    assert (report.missing, report.resized, len(report.skipped)) == (["sie_embed"], [], 12 + 2)
    assert_loaded(model, state, but=("sie_embed",))


def test_vit_of_dinov2_with_registers(tmp_path: Path) -> None:
    model = vit(reg_tokens=4, no_embed_class=True, init_values=1.0)
    state = random_state(model)
    theirs = state | {"pos_embed": torch.rand(1, 1370, 96), "mask_token": torch.rand(1, 96)}
    theirs["register_tokens"] = theirs.pop("reg_token")
    torch.save(theirs, tmp_path / "dinov2.pth")
    report = load_imagenet(model, tmp_path / "dinov2.pth")
    assert (report.resized, report.skipped, report.missing) == (["pos_embed"], ["mask_token"], [])
    state["cls_token"] += theirs["pos_embed"][:, :1]
    assert_loaded(model, state, but=("pos_embed",))


@pytest.mark.parametrize("authors", [False, True])
def test_rotary_vit_of_dinov3(tmp_path: Path, authors: bool) -> None:
    source = Eva(embed_dim=96, depth=1, num_heads=4, num_classes=0, num_reg_tokens=4, init_values=1.0,
                 use_fc_norm=False, use_abs_pos_emb=False, use_rot_pos_emb=True, rope_type="dinov3")  # fmt: skip
    theirs = random_state(source)
    model = from_timm(source, image_size=(64, 32), stride=(12, 12), num_cameras=6)
    state = {f"{n.replace('gamma_', 'ls')}.gamma" if authors and "gamma_" in n else n: t for n, t in theirs.items()}
    if authors:
        state |= {"storage_tokens": state.pop("reg_token"), "rope_embed.periods": torch.rand(6)}
    torch.save(state, tmp_path / "dinov3.pth")
    report = load_imagenet(model, tmp_path / "dinov3.pth")
    assert (report.skipped, report.missing) == (["rope_embed.periods"] if authors else [], ["sie_embed"])
    assert_loaded(model, theirs, but=("sie_embed",))


def test_t2t_of_its_authors(tmp_path: Path) -> None:
    model = T2TViT(96, 1, 4, image_size=(64, 32))
    state = random_state(model) | {"pos_embed": torch.rand(1, 197, 96)}
    theirs = {name.replace("patch_embed", "tokens_to_token"): value for name, value in state.items()}
    torch.save({"state_dict": {}, "state_dict_ema": theirs}, tmp_path / "t2t.pth")
    report = load_imagenet(model, tmp_path / "t2t.pth")
    assert (report.resized, report.skipped, report.missing) == (["pos_embed"], [], [])
    assert_loaded(model, state | {"pos_embed": resize_positions(state["pos_embed"], 1, (14, 14), 1, (4, 2))})


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(random_state(ResNet((1, 1, 1, 1))), tmp_path / "resnet.pth")
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"resnet.pth: fits 0 of 18 entries of the ViT, at least half must"):
        load_imagenet(model, tmp_path / "resnet.pth")
    assert_loaded(model, before)


def test_the_configuration_says_which_file_starts_which_branch(tmp_path: Path) -> None:
    model, other = (FusionReID(ResNet((1, 1, 1, 1)), vit(), num_classes=4, width=96, layers=1) for _ in range(2))
    paths = {"PRETRAIN_PATH_R": str(tmp_path / "cnn.pth"), "PRETRAIN_PATH_T": str(tmp_path / "transformer.pth")}
    torch.save(other.cnn.state_dict(), paths["PRETRAIN_PATH_R"])
    torch.save(other.transformer.state_dict(), paths["PRETRAIN_PATH_T"])
    assert load_pretrained(model, ModelConfig(PRETRAIN_CHOICE="none")) == []
    reports = load_pretrained(model, ModelConfig(**paths))
    assert [report.source for report in reports] == list(paths.values())
    for branch in ("cnn", "transformer"):
        assert_loaded(getattr(model, branch), getattr(other, branch).state_dict())
