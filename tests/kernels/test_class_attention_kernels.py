"""The kernels of dual_cross_attention: as accurate as plain torch around their blocks, and well-behaved operators."""

from collections.abc import Callable

import pytest
import torch

from fusionreid.kernels import dual_cross_attention, reference
from tests.kernels.test_class_attention import cast, check_accuracy, make_stream, with_gradients
from tests.numerics import assert_as_accurate

pytestmark = pytest.mark.usefixtures("triton_path")

# One below, at and above the kernels' blocks of 16 tokens, 15 heads and 128 columns.
KERNEL_SHAPES = [
    *((2, 1, 1, 4, 8), (1, 15, 15, 2, 30), (2, 16, 12, 4, 127), (2, 17, 15, 2, 128), (1, 33, 3, 16, 129)),
    (1, 131, 2, 33, 257),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_they_are_as_accurate_as_plain_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_accuracy(shape, dtype)


@pytest.mark.parametrize("width", [30, 257])
def test_a_large_mean_does_not_cancel_the_variance(width: int) -> None:
    stream = make_stream(2, 17, 3, 4, width)
    stream = stream._replace(tokens=(stream.tokens + 1000).float().double())
    out = dual_cross_attention(cast(stream, torch.float32))
    low, gold = (reference.dual_cross_attention(cast(stream, dtype)) for dtype in (torch.float32, torch.double))
    assert_as_accurate("context", out, low, gold)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean", [10, 100])
def test_a_large_mean_does_not_drown_the_gradients(mean: float, dtype: torch.dtype) -> None:
    stream = make_stream(2, 40, 3, 8, 48)
    stream = cast(stream._replace(tokens=torch.randn(2, 40, 48) + mean), dtype)
    upstream = torch.randn(2, 24).to(dtype)
    out = with_gradients(dual_cross_attention, stream, upstream)
    gold = with_gradients(reference.dual_cross_attention, cast(stream, torch.double), upstream)
    del out["norm_bias"]
    for name, value in out.items():
        error = (value.double() - gold[name]).norm() / gold[name].norm()
        assert error < 4 * torch.finfo(dtype).eps, f"{name}: relative error {error:.1e}"


def heads_outermost(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def columns_apart(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT


@pytest.mark.parametrize("strided", [heads_outermost, columns_apart, lambda x: x[:1].expand(x.shape)])
def test_each_stream_has_its_own_strides(strided: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What the queries absorbed lies as its product leaves it, which no rule of einsum fixes."""
    tokens, vectors = [torch.randn(2, n, 24) for n in (5, 17)], [torch.randn(24) for _ in range(2)]
    first, second = torch.randn(2, 3, 24), strided(torch.randn(2, 3, 24))

    def results(*absorbed: torch.Tensor) -> list[torch.Tensor]:
        found = torch.ops.fusionreid.class_attention(tokens, absorbed, vectors, vectors, [1e-5, 1e-5], 0.3, True)
        slopes = [x.roll(1, 2) for x in found[:2]]
        return found + torch.ops.fusionreid.class_attention_backward(tokens, absorbed, vectors, found[2:], slopes, 0.3)

    torch.testing.assert_close(results(first, second), results(first, second.contiguous()), rtol=0, atol=0)


def test_they_are_well_behaved_operators() -> None:
    forward, backward = torch.ops.fusionreid.class_attention, torch.ops.fusionreid.class_attention_backward
    shapes = ((2, 17, 24), (2, 3, 24), (24,), (24,))
    inputs = [[torch.randn(shape, requires_grad=True) for _ in range(2)] for shape in shapes]
    torch.library.opcheck(forward.default, (*inputs, [1e-5, 1e-6], 0.3, True))
    results = forward(*inputs, [1e-5, 1e-6], 0.3, True)
    detached = [[t.detach() for t in tensors] for tensors in (*inputs[:3], results[2:], results[:2])]
    torch.library.opcheck(backward.default, (*detached, 0.3))
    assert len(forward(*inputs, [1e-5, 1e-6], 0.3, False)) == 2  # nothing for a backward pass


def test_they_refuse_what_a_program_cannot_hold() -> None:
    with pytest.raises(ValueError, match="got 16 heads padded to 32 and width 513"):
        dual_cross_attention(make_stream(1, 2, 16, 1, 513, torch.float32))
