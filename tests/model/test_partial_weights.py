"""A weight file that fits in part is of another architecture, and one that is none says what it is."""

from pathlib import Path

import pytest
import torch

from fusionreid.backbones.resnet import ResNet
from fusionreid.weights import WeightsError, load_imagenet
from tests.model.test_weights import assert_loaded, random_state, vit


def test_a_deeper_network_of_the_same_family_is_refused(tmp_path: Path) -> None:
    """Its blocks have layers of other shapes under the same names; most entries, norms and biases, fit."""
    model, state = ResNet((1, 1, 1, 1)), random_state(ResNet((1, 1, 1, 1)))
    state["layer2.0.conv2.weight"] = torch.rand(7, 128, 3, 3)
    torch.save(state, tmp_path / "resnet.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        WeightsError, match=r"1 of \d+ layers are of another architecture: layer2.0.conv2.weight .* has"
    ):
        load_imagenet(model, tmp_path / "resnet.pth")
    assert_loaded(model, before)


def test_a_block_too_few_is_refused(tmp_path: Path) -> None:
    state = {name: value for name, value in random_state(vit(depth=3)).items() if not name.startswith("blocks.2.")}
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=r"4 of 13 layers .*: blocks.2.attn.qkv.weight .* is not in the file; set"):
        load_imagenet(vit(depth=3), tmp_path / "vit.pth")


def test_norms_and_tokens_may_be_missing_and_are_told(tmp_path: Path) -> None:
    state = random_state(vit())
    for name in ("cls_token", "norm.weight", "norm.bias", "sie_embed"):
        del state[name]
    torch.save(state, tmp_path / "vit.pth")
    assert load_imagenet(vit(), tmp_path / "vit.pth").missing == ["cls_token", "sie_embed", "norm.weight", "norm.bias"]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = random_state(vit())
    state["norm.bias"][3] = torch.nan
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=r"1 entries are not finite, the first is norm\.bias"):
        load_imagenet(vit(), tmp_path / "vit.pth")


@pytest.mark.parametrize(("content", "words"), [
    (b"\xef\xbb\xbf <html>", "it is a web page"), (None, "it is a folder"),
    (b'{"error": "Entry not found"}', r"""a text that begins with '\{"error": "Entry not found"\}'"""),
])  # fmt: skip
def test_what_came_in_place_of_weights_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "weights.pth"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        load_imagenet(vit(), path)
