"""Checkpoints of the published repository: the recorded names of every model, and what does not fit."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionreid.backbones.resnet import ResNet
from fusionreid.config import ModelConfig
from fusionreid.model import FusionReID, build_model
from fusionreid.weights import WeightsError, load_published, published_names
from tests.numerics import FIXTURES
from tests.test_weights import assert_loaded, random_state, vit

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
