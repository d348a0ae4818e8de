"""Finished models: the published names of every model, what does not fit, and fine-tuning from ours or theirs."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionreid.backbones.resnet import ResNet
from fusionreid.backbones.t2t import T2TViT
from fusionreid.config import ModelConfig
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.config import Config
from fusionreid.model import FusionReID, build_model
from fusionreid.weights import (
    LoadReport,
    WeightsError,
    load_finetune,
    load_imagenet,
    load_pretrained,
    load_published,
    published_names,
)
from fusionreid.weights.checkpoint_files import DamagedError
from fusionreid.weights.formats import read_state, resize_positions
from tests.model.test_weights import assert_loaded, random_state, vit
from tests.numerics import FIXTURES

UNUSED = ("base.fc.weight", "base.fc.bias", "base.head.weight", "base.head.bias")


def build(name: str, share: Any = "none") -> FusionReID:
    if name.startswith("tiny"):
        return FusionReID(ResNet((1, 1, 1, 1)), vit(2), num_classes=16, width=96, layers=int(name[-1]), share=share)
    config = {"TRANS_USE": name != "resnet50_only", "RES_USE": name != "vitb_s12_only"}
    config["TRANSFORMER_TYPE"] = "t2t_vit_t_14" if name.startswith("t2t") else "vit_base_patch16_224"
    return build_model(ModelConfig(HTM_SHARE=share, **config), num_classes=16)


def recorded(name: str) -> dict[str, Tensor]:
    entries = json.loads((FIXTURES / f"models/{name}.state.json").read_text())
    return {n: torch.empty(e["shape"], dtype=getattr(torch, e["dtype"]), device="meta") for n, e in entries.items()}


@pytest.mark.parametrize(
    "name", ["vitb_s12_r50_l2", "t2t14_r50_l2", "resnet50_only", "vitb_s12_only", "tiny_l1", "tiny_l2"]
)
def test_published_names_are_the_recorded_ones(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    published, names, state = recorded(name), published_names(model), model.state_dict()
    assert list(names) == list(state)
    unused = {name for name in published if name.endswith(UNUSED)}
    shapes = {name: value.shape for name, value in published.items() if name not in unused}
    assert {names[name]: value.shape for name, value in state.items()} == shapes
    report = load_published(model, {f"module.{n}": t for n, t in published.items()})
    assert (set(report.skipped), report.loaded, report.missing) == (unused, list(state), [])


def test_load_published_puts_every_entry_in_its_place() -> None:
    model = build("tiny_l1")
    names = published_names(model)
    state = {names[name]: value for name, value in random_state(model).items()}
    load_published(model, state)
    assert_loaded(model, {name: state[theirs] for name, theirs in names.items()})


def test_the_neck_that_neck_no_leaves_unused_is_skipped() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(NECK="no", HTM_SHARE="none"), num_classes=16)
    state = recorded("vitb_s12_r50_l2")
    skipped = load_published(model, state).skipped
    assert skipped == [n for n in state if n.startswith("resnet.bottleneck.") or n.endswith(UNUSED)]
    assert len(skipped) == 5 + 2


@pytest.mark.parametrize("share", ["encoder", "fusion", "all"])
def test_other_sharing_is_named(share: str) -> None:
    with (
        torch.device("meta"),
        pytest.raises(WeightsError, match=rf"HTM_SHARE none, the model has {share}: set it to none"),
    ):
        load_published(build("tiny_l2", share), recorded("tiny_l2"))


def test_differences_are_listed() -> None:
    with torch.device("meta"):
        model = build("resnet50_only")
    state = recorded("resnet50_only")
    state["surplus"] = state.pop("gap.p")
    state["classifier.weight"] = torch.empty(751, 2048, device="meta")
    with pytest.raises(WeightsError) as error:
        load_published(model, state)
    rows = [" ".join(line.split()) for line in str(error.value).splitlines()[2:]]
    assert rows == ["classifier.weight (16, 2048) (751, 2048)", "gap.p (1,) -", "surplus - (1,)"]
    with pytest.raises(WeightsError, match=f"and {len(state) - 20} more"):
        load_published(model, {})


def test_a_file_of_the_published_code_is_read_as_it_is(tmp_path: Path) -> None:
    """T2T-ViT's and CLIP's names are translated on reading, also where the published model has them."""
    cnn, t2t = ResNet((1, 1, 1, 1)), T2TViT(96, 1, 4, image_size=(64, 32), num_cameras=6)
    model = FusionReID(cnn, t2t, num_classes=4, width=96, layers=1, share="none")
    names, state = published_names(model), random_state(model)
    torch.save({names[name]: value for name, value in state.items()}, tmp_path / "t2t.pth")
    load_published(model, read_state(tmp_path / "t2t.pth"))
    assert_loaded(model, state)


SMALL = {"RES_NAME": "resnet10t", "TRANSFORMER_TYPE": "vit_tiny_patch16_224", "MIX_DIM": 96, "HTM_LAYER": 1}
CLASSIFIERS = [f"heads.{i}.classifier.weight" for i in range(6)]
POSITIONS, CAMERAS = "transformer.pos_embed", "transformer.sie_embed"


def assert_tuned(model: FusionReID, report: LoadReport, state: dict[str, Tensor], grid: tuple[int, int]) -> None:
    """Everything is as in the file but what belongs to its persons and cameras; its positions had `grid`."""
    assert (report.resized, sorted(report.dropped)) == ([POSITIONS], [*CLASSIFIERS, CAMERAS])
    assert report.missing == report.skipped == []
    assert {*report.loaded, *report.resized, *report.dropped} == state.keys()
    for text in ("1 resized (transformer.pos_embed)", "7 dropped", "heads.*.classifier.weight", CAMERAS):
        assert text in report.describe()
    resized = resize_positions(state[POSITIONS], 1, grid, 1, model.transformer.grid)
    assert_loaded(model, state | {POSITIONS: resized}, but=(*CLASSIFIERS, CAMERAS))


def test_fine_tuning_from_a_checkpoint_of_ours(tmp_path: Path) -> None:
    """Its 13 positions alone would be taken for a grid of 6 x 2; the configuration says 4 x 3."""
    saved = Config(MODEL=ModelConfig(STRIDE_SIZE=(16, 16), **SMALL)).model_dump(mode="json")
    saved["INPUT"]["SIZE_TRAIN"] = [64, 48]
    source = build_model(ModelConfig(STRIDE_SIZE=(16, 16), **SMALL), (64, 48), num_classes=7, num_cameras=3)
    state = random_state(source)
    path = checkpoint.save(tmp_path, 5, {"model": state, "optimizer": {}}, {"config": saved, "classes": 7})
    config = ModelConfig(PRETRAIN_CHOICE="checkpoint", PRETRAIN_PATH=str(path), **SMALL)
    model = build_model(config, (96, 48), num_classes=5, num_cameras=6)
    before = {name: model.state_dict()[name].clone() for name in (*CLASSIFIERS, CAMERAS)}
    (report,) = load_pretrained(model, config)
    assert_tuned(model, report, state, (4, 3))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    path = checkpoint.save(tmp_path, 5, {"model": state, "optimizer": {}}, {})
    with pytest.raises(WeightsError, match=r"state\.json: must hold the configuration"):
        load_finetune(model, path)


def test_fine_tuning_reads_no_checkpoint_with_a_flipped_bit_or_a_cut_manifest(tmp_path: Path) -> None:
    config = ModelConfig(PRETRAIN_CHOICE="checkpoint", STRIDE_SIZE=(16, 16), **SMALL)
    model = build_model(config, (64, 48), num_classes=7, num_cameras=3)
    saved = Config(MODEL=config).model_dump(mode="json")
    saved["INPUT"]["SIZE_TRAIN"] = [64, 48]
    path = checkpoint.save(tmp_path, 5, {"model": random_state(model), "optimizer": {}}, {"config": saved})
    draw = random.Random(1111)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for _ in range(5):
            place = draw.randrange(len(whole))
            with open(file, "r+b") as opened:
                opened.seek(place)
                opened.write(bytes([whole[place] ^ 1 << draw.randrange(8)]))
            with pytest.raises(DamagedError, match=r"is damaged|is not valid"):
                load_finetune(model, path)
            file.write_bytes(whole)
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DamagedError):
            load_finetune(model, path)
        file.write_bytes(whole)
    assert load_finetune(model, path).missing == []
    tensors = path / "model.safetensors"  # named as a backbone's file, which it can be too
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedError, match=r"model\.safetensors is damaged"):
        load_imagenet(model.cnn, tensors)
    tensors.write_bytes(whole)
    load_imagenet(model.cnn, tensors)


def test_fine_tuning_from_a_file_of_the_published_code(tmp_path: Path) -> None:
    def build(size: tuple[int, int], stride: int, classes: int, cameras: int) -> FusionReID:
        config = ModelConfig(STRIDE_SIZE=(stride, stride), HTM_SHARE="none", **SMALL)
        return build_model(config, size, num_classes=classes, num_cameras=cameras)

    source, model = build((256, 128), 12, 7, 6), build((128, 128), 16, 5, 15)
    names, state = published_names(source), random_state(source)
    torch.save({f"module.{names[name]}": value for name, value in state.items()}, tmp_path / "msmt.pth")
    assert_tuned(model, load_finetune(model, tmp_path / "msmt.pth"), state, (21, 10))


def test_fine_tuning_from_another_model_is_refused(tmp_path: Path) -> None:
    torch.save(random_state(ResNet((1, 1, 1, 1))), tmp_path / "resnet.pth")
    with pytest.raises(WeightsError, match=r"resnet\.pth: fits 0 of \d+ entries of the FusionReID"):
        load_finetune(build("tiny_l1"), tmp_path / "resnet.pth")
