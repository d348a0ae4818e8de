"""smoothed_cross_entropy: as accurate as plain torch, soft targets, wide rows, registration, wrong inputs."""

import pytest
import torch
from torch import Tensor

from fusionreid.kernels import cross_entropy, reference, smoothed_cross_entropy
from tests.numerics import assert_as_accurate, assert_close

# Images, classes, heads: one below, at and above a block of 128 and of 4096.
SHAPES = [(3, 1, 1), (2, 127, 2), (3, 128, 1), (2, 129, 3), (2, 751, 6), (2, 4095, 1), (1, 4096, 1), (2, 4097, 2)]


def losses_and_gradients(op, logits: list[Tensor], persons: Tensor, smoothing: float, upstream: Tensor) -> list[Tensor]:
    logits = [z.detach().requires_grad_() for z in logits]
    losses = op(logits, persons, smoothing)
    return [losses, *torch.autograd.grad((losses * upstream).sum(), logits)]


def check(images: int, classes: int, heads: int, dtype: torch.dtype, smoothing: float) -> None:
    logits = [(4 * torch.randn(images, classes)).to(dtype) for _ in range(heads)]
    persons, upstream = torch.randint(0, classes, (images,)), torch.randn(heads)
    out = losses_and_gradients(smoothed_cross_entropy, logits, persons, smoothing, upstream)
    low = losses_and_gradients(reference.smoothed_cross_entropy, logits, persons, smoothing, upstream)
    doubles = [z.double() for z in logits]
    gold = losses_and_gradients(reference.smoothed_cross_entropy, doubles, persons, smoothing, upstream)
    assert out[0].dtype == torch.float32
    for name, *values in zip(("losses", *("gradient" for _ in logits)), out, low, gold):
        assert_as_accurate(name, *values)
    again = losses_and_gradients(smoothed_cross_entropy, logits, persons, smoothing, upstream)
    assert all(torch.equal(a, b) for a, b in zip(out, again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("images", "classes", "heads"), SHAPES)
def test_is_as_accurate_as_plain_torch(images: int, classes: int, heads: int, dtype: torch.dtype) -> None:
    check(images, classes, heads, dtype, 0.1)


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("smoothing", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("images", "classes", "heads"), SHAPES)
def test_kernels_are_as_accurate_as_plain_torch(
    images: int, classes: int, heads: int, dtype: torch.dtype, smoothing: float
) -> None:
    check(images, classes, heads, dtype, smoothing)


@pytest.mark.usefixtures("triton_path")
def test_kernels_hold_at_a_hundred_thousand_classes() -> None:
    check(2, 100_000, 1, torch.float32, 0.1)


def test_gradcheck_of_the_reference() -> None:
    z, persons = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda t: reference.smoothed_cross_entropy([t], persons, 0.2), z)


@pytest.mark.usefixtures("triton_path")
def test_kernels_take_large_logits_excluded_classes_several_types_and_strides() -> None:
    wide = torch.randn(2, 2, 9)
    logits = [1e4 * torch.randn(2, 9), wide[:, 1], wide[:, 0].half(), torch.randn(9, 2).T]
    persons = torch.tensor([8, 3])
    doubles = [z.double() for z in logits]
    gold = losses_and_gradients(reference.smoothed_cross_entropy, doubles, persons, 0.1, torch.ones(4))
    out = losses_and_gradients(smoothed_cross_entropy, logits, persons, 0.1, torch.ones(4))
    for value, expected, logit in zip(out, gold, [out[0], *logits]):
        assert value.dtype == logit.dtype
        assert_close("loss and gradients", value, expected, 2 * torch.finfo(value.dtype).eps)
    excluded = logits[1].index_fill(1, torch.tensor([0]), -torch.inf)
    expected = torch.nn.functional.cross_entropy(excluded.double(), persons)
    assert_close("excluded", smoothed_cross_entropy([excluded], persons, 0.0)[0], expected, 1e-6)


@pytest.mark.usefixtures("triton_path")
def test_kernels_keep_a_small_loss_of_large_logits_and_take_every_other_label() -> None:
    z, persons = torch.tensor([[9999.0, 1e4], [1e4, 9999.0]], requires_grad=True), torch.tensor([1, 1, 0, 0])[::2]
    losses = smoothed_cross_entropy([z, z], persons, 0.0)
    assert_close("losses", losses, torch.tensor([-1.0, -1.0]).exp().log1p(), 1e-6)
    (gradient,) = torch.autograd.grad(losses, z, torch.tensor([1.0, 3.0]))
    share = 4 * torch.tensor(-1.0).sigmoid() / 2
    assert_close("gradient", gradient, share * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), 1e-6)


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("level", [-1e31, -3e38, torch.finfo(torch.float32).min, 3e38])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's numpy, on purpose
def test_kernels_take_all_that_float32_holds(level: float, smoothing: float) -> None:
    logits = [torch.full((2, 5), level, requires_grad=True)]
    out = losses_and_gradients(smoothed_cross_entropy, logits, torch.tensor([0, 3]), smoothing, torch.ones(1))
    doubles = [z.double() for z in logits]
    gold = losses_and_gradients(
        reference.smoothed_cross_entropy, doubles, torch.tensor([0, 3]), smoothing, torch.ones(1)
    )
    for value, expected in zip(out, gold):
        assert_close("loss and gradient", value, expected, 1e-6)


@pytest.mark.usefixtures("triton_path")
def test_kernels_show_nan_and_labels_out_of_range() -> None:
    z = torch.randn(2, 4)
    for label in (-1, 4):
        assert smoothed_cross_entropy([z], torch.tensor([0, label])).isnan().all()
    z[1, 2] = torch.nan
    assert smoothed_cross_entropy([z, torch.randn(2, 4)], torch.tensor([0, 0])).isnan().tolist() == [True, False]


@pytest.mark.usefixtures("triton_path")
def test_kernels_are_registered_whole() -> None:
    logits, persons = [torch.randn(3, 4, requires_grad=True), torch.randn(3, 4).half()], torch.tensor([0, 3, 1])
    detached = [z.detach() for z in logits]
    torch.library.opcheck(cross_entropy._forward, (detached, persons, 0.1))
    _, lse = cross_entropy._forward(detached, persons, 0.1)
    torch.library.opcheck(cross_entropy._backward, (torch.randn(2), detached, persons, lse, 0.1))
    compiled = torch.compile(lambda *z: smoothed_cross_entropy(z, persons), backend="aot_eager", fullgraph=True)
    losses = [op(*logits) for op in (compiled, lambda *z: smoothed_cross_entropy(z, persons))]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits[0]) for loss in losses))


def test_wrong_input_is_named() -> None:
    z, persons = torch.ones(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"B = 2 persons and .*, got \(2, 4\) torch.float32 on cpu in head 1"):
        smoothed_cross_entropy([z, torch.ones(2, 4)], persons)
    with pytest.raises(ValueError, match=r"smoothing 1\.5"):
        smoothed_cross_entropy([z], persons, 1.5)
    with pytest.raises(ValueError, match=r"got .* on meta in head 0"):
        smoothed_cross_entropy([z.to("meta")], persons)
    for wrong in (persons.int(), persons.double(), persons[:, None]):
        with pytest.raises(ValueError, match=r"persons must be \(B,\) int64, got"):
            smoothed_cross_entropy([z], wrong)
    with pytest.raises(ValueError, match="0 heads"):
        smoothed_cross_entropy([], persons)
