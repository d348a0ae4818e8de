"""dual_self_attention: as accurate as plain torch, gradients, two streams, compile, autocast, wrong inputs."""

import pytest
import torch
from torch import Tensor

from kernels import dual_self_attention, reference
from tests.numerics import assert_as_accurate

SHAPES = [(2, 1, 1, 8), (3, 15, 2, 16), (2, 16, 3, 32), (2, 17, 3, 48), (1, 129, 2, 64), (1, 211, 1, 96)]  # B, N, H, D


def with_gradients(op, inputs: list[Tensor], upstream: list[Tensor], **options) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    answer = op(*inputs, **options)
    outputs = list(answer) if isinstance(answer, tuple) else [answer]
    return [*outputs, *torch.autograd.grad(outputs, inputs, [u.to(o.dtype) for u, o in zip(upstream, outputs)])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_accurate_as_plain_torch(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, tokens, heads, width = shape
    qkv = torch.randn(batch, tokens, 3, heads, width).to(dtype)
    upstream = [torch.randn(batch, tokens, heads * width).to(dtype)]
    out = with_gradients(dual_self_attention, [qkv], upstream)
    low = with_gradients(reference.dual_self_attention, [qkv], upstream)
    gold = with_gradients(reference.dual_self_attention, [qkv.double()], upstream)
    for name, *values in zip(("output", "gradient of qkv"), out, low, gold):
        assert values[0].dtype == dtype
        assert_as_accurate(name, *values)


@pytest.mark.parametrize("shape", SHAPES)
def test_is_exact_in_double(shape: tuple[int, int, int, int]) -> None:
    batch, tokens, heads, width = shape
    qkv = torch.randn(batch, tokens, 3, heads, width, dtype=torch.double)
    upstream = [torch.randn(batch, tokens, heads * width, dtype=torch.double)]
    out = with_gradients(dual_self_attention, [qkv], upstream)
    torch.testing.assert_close(out, with_gradients(reference.dual_self_attention, [qkv], upstream), rtol=0, atol=1e-12)


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
    with pytest.raises(ValueError, match=r"qkv_a must be \(B, N, 3, H, D\), got \(2, 5, 96\)"):
        dual_self_attention(qkv.flatten(2))
    with pytest.raises(ValueError, match=r"qkv_b must be \(B, N, 3, H, D\), got \(2, 5, 2, 2, 16\)"):
        dual_self_attention(qkv, qkv[:, :, :2])
    with pytest.raises(ValueError, match="same images, heads and head width"):
        dual_self_attention(qkv, qkv[:1])
