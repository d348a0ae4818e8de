"""The kernels of dual_cross_attention: as accurate as plain torch around their blocks, and well-behaved operators."""

import pytest
import torch

from fusionreid.kernels import dual_cross_attention, reference
from tests.kernels.test_class_attention import cast, check_accuracy, make_stream
from tests.numerics import assert_as_accurate

pytestmark = pytest.mark.usefixtures("triton_path")

# One below, at and above the kernels' blocks of 16 tokens, 14 heads and 128 columns.
KERNEL_SHAPES = [
    *((2, 1, 1, 4, 8), (1, 15, 15, 2, 30), (2, 16, 12, 4, 127), (2, 17, 14, 2, 128), (1, 33, 3, 16, 129)),
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


def test_they_are_well_behaved_operators() -> None:
    forward, backward = torch.ops.fusionreid.class_attention, torch.ops.fusionreid.class_attention_backward
    shapes = ((2, 17, 24), (2, 3, 24), (24,), (24,))
    inputs = [[torch.randn(shape, requires_grad=True) for _ in range(2)] for shape in shapes]
    torch.library.opcheck(forward.default, (*inputs, [1e-5, 1e-6], 0.3, True))
    pooled, traces = (forward(*inputs, [1e-5, 1e-6], 0.3, True)[i : i + 2] for i in (0, 2))
    detached = [[t.detach() for t in tensors] for tensors in (*inputs[:3], pooled, traces, pooled)]
    torch.library.opcheck(backward.default, (*detached, 0.3))
    assert len(forward(*inputs, [1e-5, 1e-6], 0.3, False)) == 2  # nothing for a backward pass


def test_they_refuse_what_a_program_cannot_hold() -> None:
    with pytest.raises(ValueError, match="got 15 heads padded to 32 and width 513"):
        dual_cross_attention(make_stream(1, 2, 15, 1, 513, torch.float32))
