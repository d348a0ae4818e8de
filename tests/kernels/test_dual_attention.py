"""dual_self_attention: as accurate as plain torch, gradients, two streams, compile, autocast, wrong inputs."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusionreid.kernels import dual_self_attention, reference
from tests.numerics import assert_as_accurate

SHAPES = [(2, 1, 1, 8), (3, 15, 2, 16), (2, 16, 3, 32), (2, 17, 3, 48), (1, 129, 2, 64), (1, 211, 1, 96)]  # B, N, H, D


def with_gradients(op, inputs: list[Tensor], upstream: list[Tensor], **options) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    answer = op(*inputs, **options)
    outputs = list(answer) if isinstance(answer, tuple) else [answer]
    return [*outputs, *torch.autograd.grad(outputs, inputs, [u.to(o.dtype) for u, o in zip(upstream, outputs)])]


def check_accuracy(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Output and gradient are as accurate as plain torch's, and the same bits again."""
    batch, tokens, heads, width = shape
    qkv = torch.randn(batch, tokens, 3, heads, width).to(dtype)
    upstream = [torch.randn(batch, tokens, heads * width).to(dtype)]
    out = with_gradients(dual_self_attention, [qkv], upstream)
    low = with_gradients(reference.dual_self_attention, [qkv], upstream)
    gold = with_gradients(reference.dual_self_attention, [qkv.double()], upstream)
    for name, *values in zip(("output", "gradient of qkv"), out, low, gold):
        assert values[0].dtype == dtype
        assert_as_accurate(name, *values)
    again = with_gradients(dual_self_attention, [qkv], upstream)
    torch.testing.assert_close(out, again, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_accurate_as_plain_torch(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_accuracy(shape, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_is_exact_in_double(shape: tuple[int, int, int, int]) -> None:
    batch, tokens, heads, width = shape
    qkv = torch.randn(batch, tokens, 3, heads, width, dtype=torch.double)
    upstream = [torch.randn(batch, tokens, heads * width, dtype=torch.double)]
    out = with_gradients(dual_self_attention, [qkv], upstream)
    torch.testing.assert_close(out, with_gradients(reference.dual_self_attention, [qkv], upstream), rtol=0, atol=1e-12)


# One below, at and above the kernels' blocks; 65, 129: the class token is taken apart.
KERNEL_SHAPES = [
    *((2, 1, 1, 8), (1, 15, 3, 16), (2, 16, 2, 32), (2, 17, 2, 48), (1, 64, 1, 64), (2, 65, 2, 64), (1, 66, 1, 64)),
    *((1, 128, 1, 64), (1, 129, 1, 64), (1, 130, 1, 64), (1, 193, 1, 64), (1, 211, 1, 64), (1, 256, 1, 32)),
]


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernels_are_as_accurate_as_plain_torch(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_accuracy(shape, dtype)


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize(
    ("shape", "dtype", "launches"),
    [
        ((1, 256, 3, 1, 64), torch.float16, 1),
        ((1, 257, 3, 1, 16), torch.float16, 0),
        ((1, 5, 3, 1, 65), torch.float16, 0),
        ((1, 5, 3, 1, 16), torch.float32, 0),
    ],
)
def test_what_the_kernels_do_not_take_goes_to_sdpa(shape: tuple[int, ...], dtype: torch.dtype, launches: int) -> None:
    qkv = torch.randn(shape).to(dtype)
    with Calls() as calls:
        out = dual_self_attention(qkv)
    assert calls.names.count("fusionreid::dual_self_attention") == launches
    assert_as_accurate("output", out, reference.dual_self_attention(qkv), reference.dual_self_attention(qkv.double()))


@pytest.mark.usefixtures("triton_path")
def test_kernels_take_two_streams() -> None:
    qkv = [torch.randn(2, n, 3, 2, 32).to(torch.float16) for n in (65, 40)]
    upstream = [torch.randn(2, n, 64) for n in (65, 40)]
    both = with_gradients(dual_self_attention, qkv, upstream, scale=0.3)
    for i in range(2):
        alone = with_gradients(dual_self_attention, [qkv[i]], [upstream[i]], scale=0.3)
        torch.testing.assert_close([both[i], both[2 + i]], alone, rtol=0, atol=0)


class Calls(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None) -> Any:
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.usefixtures("triton_path")
def test_kernels_fill_no_gradient_with_zeros() -> None:
    qkv = [torch.randn(2, n, 3, 2, 16, dtype=torch.float16, requires_grad=True) for n in (5, 9)]
    outputs = dual_self_attention(*qkv)
    with Calls() as calls:
        torch.autograd.grad(outputs, qkv, [torch.ones_like(y) for y in outputs])
    assert not any("zeros" in name for name in calls.names)
    used, unused = torch.autograd.grad(dual_self_attention(*qkv)[0].sum(), qkv, allow_unused=True)
    torch.testing.assert_close(used, *torch.autograd.grad(dual_self_attention(qkv[0]).sum(), qkv[:1]), rtol=0, atol=0)
    assert unused is None


@pytest.mark.usefixtures("triton_path")
def test_kernels_keep_a_wrong_number_in_its_head() -> None:
    qkv = torch.randn(2, 65, 3, 2, 16, dtype=torch.float16)
    qkv[1, 7, 1, 0, 3] = torch.nan
    is_nan = dual_self_attention(qkv).isnan().unflatten(2, (2, 16))
    assert is_nan[1, :, 0].all()
    assert not is_nan[0].any()
    assert not is_nan[1, :, 1].any()


@pytest.mark.usefixtures("triton_path")
def test_kernels_survive_large_scores() -> None:
    qkv = torch.full((1, 40, 3, 1, 16), 100.0, dtype=torch.float16)  # scores of 40,000
    qkv[0, 0, 0] = -100.0
    torch.testing.assert_close(dual_self_attention(qkv), torch.full((1, 40, 16), 100.0, dtype=torch.float16))


@pytest.mark.usefixtures("triton_path")
def test_kernels_are_well_behaved_operators() -> None:
    qkv = torch.randn(1, 17, 3, 2, 16, dtype=torch.float16, requires_grad=True)
    torch.library.opcheck(torch.ops.fusionreid.dual_self_attention.default, (qkv, 0.25))
    out, lse = torch.ops.fusionreid.dual_self_attention(qkv, 0.25)
    inputs = [t.detach() for t in (qkv, out, torch.randn_like(out), lse)]
    torch.library.opcheck(torch.ops.fusionreid.dual_self_attention_backward.default, (*inputs, 0.25))


@pytest.mark.usefixtures("triton_path")
def test_kernels_compile_to_one_graph() -> None:
    qkv = [torch.randn(2, n, 3, 2, 16, dtype=torch.float16, requires_grad=True) for n in (5, 9)]
    compiled = torch.compile(dual_self_attention, fullgraph=True, backend="aot_eager")
    upstream = [torch.randn(2, n, 32) for n in (5, 9)]
    torch.testing.assert_close(
        with_gradients(compiled, qkv, upstream), with_gradients(dual_self_attention, qkv, upstream)
    )


@pytest.mark.usefixtures("triton_path")
def test_kernels_refuse_strides() -> None:
    qkv = torch.randn(2, 5, 3, 2, 16, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"qkv_b must be contiguous, its strides are"):
        dual_self_attention(qkv, qkv.transpose(0, 1).contiguous().transpose(0, 1))


def test_two_streams_are_two_single_streams() -> None:
    qkv = [torch.randn(2, n, 3, 2, 16, dtype=torch.double) for n in (5, 9)]
    upstream = [torch.randn(2, n, 32, dtype=torch.double) for n in (5, 9)]
    both = with_gradients(dual_self_attention, qkv, upstream, scale=0.3)
    for i in range(2):
        alone = with_gradients(dual_self_attention, [qkv[i]], [upstream[i]], scale=0.3)
        torch.testing.assert_close([both[i], both[2 + i]], alone, rtol=0, atol=0)


def test_equal_keys_average_the_values() -> None:
    qkv = torch.randn(2, 6, 3, 2, 4, dtype=torch.double)
    qkv[:, :, 1] = 1.0
    mean = qkv[:, :, 2].mean(1, keepdim=True).flatten(2).expand(-1, 6, -1)
    torch.testing.assert_close(dual_self_attention(qkv), mean)


def test_reference_has_the_right_gradient() -> None:
    qkv = [torch.randn(2, n, 3, 2, 3, dtype=torch.double, requires_grad=True) for n in (3, 4)]
    torch.autograd.gradcheck(reference.dual_self_attention, qkv)


def test_compiles_to_one_graph() -> None:
    qkv = [torch.randn(2, n, 3, 2, 16) for n in (5, 9)]
    compiled = torch.compile(dual_self_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv), dual_self_attention(*qkv))


def test_runs_under_autocast() -> None:
    qkv = torch.randn(2, 5, 3, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dual_self_attention(qkv)
    torch.testing.assert_close(out.float(), dual_self_attention(qkv), rtol=0.03, atol=0.03)


def test_wrong_inputs_are_named() -> None:
    qkv = torch.randn(2, 5, 3, 2, 16)
    with pytest.raises(ValueError, match=r"qkv_a must be floating \(B, N, 3, H, D\).*, got \(2, 5, 96\)"):
        dual_self_attention(qkv.flatten(2))
    with pytest.raises(ValueError, match=r"qkv_b must be floating \(B, N, 3, H, D\).*, got \(2, 5, 2, 2, 16\)"):
        dual_self_attention(qkv, qkv[:, :, :2])
    for other in (qkv[:1], qkv[:, :, :, :1], qkv[..., :8], qkv.half(), qkv.to("meta")):
        with pytest.raises(ValueError, match="same images, heads, head width, dtype and device"):
            dual_self_attention(qkv, other)


@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-46, math.inf, math.nan])
def test_a_scale_that_is_not_positive_and_finite_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be above 0 and finite in float32, got"):
        dual_self_attention(torch.randn(1, 5, 3, 1, 16), scale=scale)
