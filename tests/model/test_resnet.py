"""ResNet against the recorded numbers, its shapes and weights' start, and timm CNNs by name."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torchvision.models.resnet import ResNet as TorchvisionResNet

from fusionreid.backbones.resnet import InstanceBatchNorm, ResNet, TimmCNN, build_cnn
from fusionreid.weights import load_imagenet
from tests.model.test_weights import assert_loaded, random_state
from tests.numerics import FIXTURES, assert_close
from tests.recorded import check_case

SHAPES = json.loads((FIXTURES / "modules/resnet_shapes.json").read_text())["shapes"]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_bottleneck_equals_the_recorded_numbers(mode: str) -> None:
    shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    block = Bottleneck(16, 8, stride=2, downsample=shortcut)
    check_case("modules/bottleneck_block", block, lambda x: block(x), mode=mode)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("last_stride", [1, 2])
def test_resnet_equals_the_recorded_numbers(last_stride: int, mode: str) -> None:
    model = ResNet((1, 1, 1, 1), last_stride)
    check_case(f"modules/resnet_tiny_laststride{last_stride}", model, lambda x: model(x), mode=mode)


@pytest.mark.parametrize("size", [(256, 128), (384, 128)])
@pytest.mark.parametrize("last_stride", [1, 2])
def test_resnet50_has_the_recorded_shapes(size: tuple[int, int], last_stride: int) -> None:
    with torch.device("meta"):
        model = build_cnn(1, last_stride=last_stride).eval()
    seen = {}
    for name, stage in model.named_children():
        stage.register_forward_hook(lambda _module, _input, output, name=name: seen.update({name: list(output.shape)}))
    features = model(torch.empty(1, 3, *size, device="meta"))
    assert features.shape[1] == model.width == 2048
    recorded = SHAPES[f"{size[0]}x{size[1]}_last_stride{last_stride}"]
    assert {name: seen[name] for name in recorded} == recorded


@pytest.mark.parametrize(("mode", "millions"), [(1, 23.508), (2, 42.500), (3, 58.144)])
def test_res_mode_chooses_the_depth(mode: int, millions: float) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in build_cnn(mode).parameters())
    assert round(count / 1e6, 3) == millions


def normalised(x: Tensor, dims: tuple[int, ...], weight: Tensor, bias: Tensor) -> Tensor:
    y = (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()
    return y * weight[:, None, None] + bias[:, None, None]


def test_instance_batch_norm_is_half_of_each() -> None:
    norm = InstanceBatchNorm(6).double()
    state = {name: torch.rand_like(value) for name, value in norm.named_parameters()}
    norm.load_state_dict(state, strict=False)
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64)
    halves = (normalised(x[:, :3], (2, 3), state["IN.weight"], state["IN.bias"]),
              normalised(x[:, 3:], (0, 2, 3), state["BN.weight"], state["BN.bias"]))  # fmt: skip
    assert_close("batch", norm(x).detach(), torch.cat(halves, 1), 1e-9)
    one = norm.eval()(x[:1].to(memory_format=torch.channels_last)).detach()
    assert_close("one image", one[:, :3], halves[0][:1], 1e-9)


@pytest.mark.parametrize(("name", "millions"), [("resnet50_ibn_a", 23.508), ("resnet101_ibn_a", 42.500)])
def test_ibn_is_in_the_first_norm_of_three_stages(name: str, millions: float) -> None:
    with torch.device("meta"):
        model, plain = build_cnn(1, name), build_cnn(1 if millions < 30 else 2)
        assert model(torch.empty(2, 3, 256, 128)).shape == (2, 2048, 16, 8)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert (type(model.act1), model.maxpool.kernel_size) == (nn.Identity, 2)
    replaced = [n for n, _ in plain.named_modules() if type(model.get_submodule(n)) is not type(plain.get_submodule(n))]
    assert replaced == [f"{n}.bn1" for n, _ in plain.named_modules() if re.fullmatch(r"layer[123]\.\d+", n)]


def test_resnet_of_ibn_net(tmp_path: Path) -> None:
    state = random_state(TorchvisionResNet(Bottleneck, [1, 1, 1, 1]))
    for name in [n for n in state if re.match(r"layer[123]\.0\.bn1\.", n)]:
        value, path = state.pop(name), name.split(".bn1.")
        halves = value.chunk(2) if value.ndim else (value, value)
        state[f"{path[0]}.bn1.BN.{path[1]}"] = halves[1]
        if path[1] in ("weight", "bias"):
            state[f"{path[0]}.bn1.IN.{path[1]}"] = halves[0]
    torch.save(state, tmp_path / "ibn.pth")
    model = ResNet((1, 1, 1, 1), ibn=True)
    report = load_imagenet(model, tmp_path / "ibn.pth")
    assert (report.skipped, report.dropped, report.missing) == (["fc.weight", "fc.bias"], [], [])
    assert_loaded(model, state)


@pytest.mark.parametrize("name", ["", "resnet18", "ibn"])
def test_meta_built_weights_are_all_filled(name: str) -> None:
    with torch.device("meta"):
        model = build_cnn(1, name) if name == "resnet18" else ResNet((1, 1, 1, 1), ibn=name == "ibn")
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(7 if tensor.dtype == torch.int64 else float("nan"))
    model.reset_parameters()
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert {int(t) for n, t in model.state_dict().items() if n.endswith("num_batches_tracked")} == {0}
    weight = dict(model.named_parameters())["body.conv1.weight" if name == "resnet18" else "conv1.weight"]
    assert weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("name", "width"), [("resnet18", 512), ("resnet50d", 2048), ("regnety_002", 368), ("mobilenetv2_100", 1280)]
)
def test_timm_cnn_by_name_keeps_the_resolution_of_its_last_stage(name: str, width: int) -> None:
    with torch.device("meta"):
        models = {stride: build_cnn(1, name, last_stride=stride).eval() for stride in (1, 2)}
        maps = {stride: model(torch.empty(1, 3, 256, 128)).shape for stride, model in models.items()}
    assert maps == {1: (1, width, 16, 8), 2: (1, width, 8, 4)}
    assert {stride: model.last_stride for stride, model in models.items()} == {1: 1, 2: 2}
    assert all(model.width == width for model in models.values())


def test_timm_cnn_without_a_removable_stride_is_left_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"), caplog.at_level(logging.WARNING):
        model = TimmCNN("convnext_atto").eval()
        features = model(torch.empty(1, 3, 256, 128))
    assert features.shape == (1, model.width, 8, 4)
    assert model.last_stride == 2
    assert "convnext_atto" in caplog.text


@pytest.mark.parametrize(("name", "rule"), [("resnet5O", "that timm"), ("vit_tiny_patch16_224", "any size")])
def test_wrong_name_is_refused(name: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"RES_NAME must .*{rule}.*"), torch.device("meta"):
        build_cnn(1, name)
