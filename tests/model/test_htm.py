"""The fusion module against the recorded numbers: its units, one layer in every mode and sharing, stacks."""

import json
from functools import partial

import pytest
import torch
from torch import Tensor

from fusionreid.htm import HTM, MFU, SEU, ClassAttention, HTMLayer, Share
from fusionreid.kernels import dual_cross_attention, dual_self_attention
from tests.numerics import FIXTURES, assert_close
from tests.recorded import check_case

SHARES: tuple[Share, ...] = ("encoder", "none", "fusion", "all")  # the published numbers 0 to 3
ENCODERS, FUSIONS = {1: ["SEU"], 2: ["SEU1", "SEU2"]}, {1: ["MFU"], 2: ["MUF_RES", "MFU_FORMER"]}


def published(name: str, layer: HTMLayer) -> str:
    for i, unit in enumerate(ENCODERS.get(len(layer.encoders), [])):
        name = name.replace(f"encoders.{i}.block.", f"{unit}.blocks.0.").replace(f"encoders.{i}.", f"{unit}.")
    for i, unit in enumerate(FUSIONS.get(len(layer.fusions), [])):
        name = name.replace(f"fusions.{i}.", f"{unit}.blocks.0.")
    return name.replace("layers.", "blocks.")


def call_layer(layer: HTMLayer, res: Tensor, former: Tensor) -> tuple[Tensor, Tensor]:
    cnn, transformer = layer((res[:, 0], former[:, 0]), (res[:, 1:], former[:, 1:]))
    return cnn[:, None], transformer[:, None]


def test_encoding_unit_equals_the_recorded_numbers() -> None:
    unit = SEU(96)

    def call(x: Tensor) -> Tensor:
        return unit.finish(x, dual_self_attention(unit.project(x)))

    check_case("modules/seu", unit, call, published=lambda name: name.replace("block.", "blocks.0."))


def test_class_attention_equals_the_recorded_numbers() -> None:
    unit = ClassAttention(96)
    check_case("modules/attention_mix", unit, lambda cls, fea: unit.proj(dual_cross_attention(unit(cls, fea))))


def test_fusion_unit_equals_the_recorded_numbers() -> None:
    unit = MFU(96)

    def call(cls: Tensor, fea: Tensor) -> Tensor:
        return unit.finish(cls, dual_cross_attention(unit.stream(cls, fea)))[:, None]

    check_case("modules/mfu", unit, call, published="blocks.0.{}".format)


@pytest.mark.parametrize(("mode", "share"), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0)])
def test_layer_equals_the_recorded_numbers(mode: int, share: int) -> None:
    layer = HTMLayer(96, share=SHARES[share], mode=mode)
    names = partial(published, layer=layer)
    check_case(f"modules/reflection_item_mode{mode}_share{share}", layer, partial(call_layer, layer), published=names)


@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize("share", range(4))
def test_layer_has_the_published_entries(mode: int, share: int) -> None:
    layer = HTMLayer(96, share=SHARES[share], mode=mode)
    states = json.loads((FIXTURES / "modules/reflection_item_states.json").read_text())
    recorded = states[f"reflection_item_mode{mode}_share{share}"]
    assert sorted(published(name, layer) for name in layer.state_dict()) == sorted(recorded)


@pytest.mark.parametrize(("depth", "width"), [(2, 96), (3, 48)])
def test_stack_equals_the_recorded_numbers(depth: int, width: int) -> None:
    htm = HTM(width, depth, share="none")

    def call(res: Tensor, former: Tensor, fea_1: Tensor, fea_2: Tensor) -> tuple[Tensor, Tensor]:
        cnn, transformer = htm((fea_1[:, 0], fea_2[:, 0]), (res, former))
        return cnn[:, None], transformer[:, None]

    check_case(f"modules/htm_depth{depth}", htm, call, published=partial(published, layer=htm.layers[0]))


@pytest.mark.usefixtures("triton_path")
def test_layer_on_the_kernels_is_the_layer_without() -> None:
    layer = HTMLayer(96, share="none")
    inputs = [torch.randn(2, *shape, 96, requires_grad=True) for shape in ((), (), (16,), (21,))]
    results = []
    for dtype in (torch.float32, torch.float64):  # float64 takes the plain path
        outputs = layer.to(dtype)(*((a.to(dtype), b.to(dtype)) for a, b in (inputs[:2], inputs[2:])))
        loss = sum((out**2).sum() for out in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [*inputs, *layer.parameters()])])
    for out, gold in zip(*results):
        assert_close("HTM layer", out, gold.double(), 2e-5)


def test_one_image_gives_what_it_gives_in_a_batch() -> None:
    htm = HTM(48, 2).double()
    cls = tuple(torch.randn(3, 48, dtype=torch.double) for _ in range(2))
    tokens = tuple(torch.randn(3, n, 48, dtype=torch.double) for n in (4, 7))
    together = htm(cls, tokens)
    alone = htm((cls[0][1:2], cls[1][1:2]), (tokens[0][1:2], tokens[1][1:2]))
    for a, b in zip(together, alone):
        torch.testing.assert_close(a[1:2], b)


def test_wrong_width_and_mode_are_named() -> None:
    with pytest.raises(ValueError, match="multiple of its 12 heads, got 100"):
        HTM(100, 1)
    with pytest.raises(ValueError, match="mode must be 0, 1, 2 or 3, got 4"):
        HTM(96, 1, mode=4)
