"""dual_cross_attention: absorbed algebra against projected keys and values, compile, autocast, wrong inputs."""

import pytest
import torch
from torch import Tensor

from kernels import ClassStream, dual_cross_attention, reference
from tests.numerics import assert_as_accurate

SHAPES = [(2, 1, 1, 4, 8), (3, 15, 2, 16, 24), (2, 16, 12, 4, 48), (2, 17, 3, 48, 96), (1, 131, 2, 33, 66)]
NAMES = ("query", "tokens", "norm_weight", "norm_bias", "key_weight", "value_weight")


def make_stream(batch: int, tokens: int, heads: int, head_width: int, width: int, dtype=torch.double) -> ClassStream:
    inner = heads * head_width
    return ClassStream(
        query=torch.randn(batch, heads, head_width).to(dtype),
        tokens=(2 * torch.randn(batch, tokens, width) + torch.randn(width)).to(dtype),
        norm_weight=(1 + 0.2 * torch.randn(width)).to(dtype),
        norm_bias=torch.randn(width).to(dtype),
        norm_eps=1e-5,
        key_weight=(torch.randn(inner, width) / width**0.5).to(dtype),
        value_weight=(torch.randn(inner, width) / width**0.5).to(dtype),
    )


def cast(stream: ClassStream, dtype: torch.dtype) -> ClassStream:
    return ClassStream(*(t.to(dtype) if isinstance(t, Tensor) else t for t in stream))


def with_gradients(op, stream: ClassStream, upstream: Tensor, **options) -> dict[str, Tensor]:
    stream = ClassStream(*(t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in stream))
    context = op(stream, **options)
    gradients = torch.autograd.grad(context, [getattr(stream, name) for name in NAMES], upstream.to(context.dtype))
    return {"context": context, **dict(zip(NAMES, gradients))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_accurate_as_plain_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stream = make_stream(*shape, dtype=dtype)
    upstream = torch.randn(shape[0], shape[2] * shape[3]).to(dtype)
    out = with_gradients(dual_cross_attention, stream, upstream)
    low = with_gradients(reference.dual_cross_attention, stream, upstream)
    gold = with_gradients(reference.dual_cross_attention, cast(stream, torch.double), upstream)
    assert out["norm_bias"].count_nonzero() == 0
    for name, value in out.items():
        assert value.dtype == dtype
        assert_as_accurate(name, value, low[name], gold[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_is_exact_in_double(shape: tuple[int, ...]) -> None:
    stream, upstream = make_stream(*shape), torch.randn(shape[0], shape[2] * shape[3], dtype=torch.double)
    out = with_gradients(dual_cross_attention, stream, upstream)
    gold = with_gradients(reference.dual_cross_attention, stream, upstream)
    torch.testing.assert_close(out, gold, rtol=1e-12, atol=1e-12)


def test_two_streams_are_two_single_streams() -> None:
    a, b = make_stream(2, 5, 3, 4, 12), make_stream(2, 9, 3, 4, 20)
    both = dual_cross_attention(a, b, scale=0.3)
    torch.testing.assert_close(both, (dual_cross_attention(a, scale=0.3), dual_cross_attention(b, scale=0.3)))
    torch.testing.assert_close(both, reference.dual_cross_attention(a, b, scale=0.3))


def test_tokens_may_be_a_slice() -> None:
    stream = make_stream(2, 9, 3, 4, 12)
    sliced, copied = stream._replace(tokens=stream.tokens[:, 1:]), stream._replace(tokens=stream.tokens[:, 1:].clone())
    torch.testing.assert_close(dual_cross_attention(sliced), dual_cross_attention(copied))


def test_reference_has_the_right_gradient() -> None:
    stream = make_stream(2, 4, 2, 3, 5)

    def context(*tensors: Tensor) -> Tensor:
        return reference.dual_cross_attention(stream._replace(**dict(zip(NAMES, tensors))))

    torch.autograd.gradcheck(context, [getattr(stream, name).requires_grad_() for name in NAMES])


def test_compiles_to_one_graph() -> None:
    streams = [cast(make_stream(2, n, 3, 4, 12), torch.float32) for n in (5, 9)]
    compiled = torch.compile(dual_cross_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*streams), dual_cross_attention(*streams))


def test_autocast_changes_the_query_alone() -> None:
    """The op computes in float32 whatever autocast says: only what reaches it is rounded."""
    stream = cast(make_stream(2, 9, 3, 4, 12), torch.float32)
    rounded = stream._replace(query=stream.query.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dual_cross_attention(stream)
        low = dual_cross_attention(rounded)
    torch.testing.assert_close(out, dual_cross_attention(stream), rtol=0, atol=0)
    torch.testing.assert_close(low, dual_cross_attention(rounded), rtol=0, atol=0)
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("field", "shape", "message"),
    [
        ("tokens", (2, 12), r"tokens \(B, N, C\)"),
        ("query", (3, 3, 4), r"query must be \(B, H, D\)"),
        ("norm_weight", (11,), r"norm_weight must be \(12,\), got \(11,\)"),
        ("norm_bias", (1,), r"norm_bias must be \(12,\), got \(1,\)"),
        ("key_weight", (12, 11), r"key_weight must be \(12, 12\), got \(12, 11\)"),
        ("value_weight", (11, 12), r"value_weight must be \(12, 12\), got \(11, 12\)"),
    ],
)
def test_wrong_inputs_are_named(field: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dual_cross_attention(make_stream(2, 5, 3, 4, 12)._replace(**{field: torch.zeros(shape)}))


def test_streams_of_different_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="same images, heads and head width"):
        dual_cross_attention(make_stream(2, 5, 3, 4, 12), make_stream(1, 5, 3, 4, 12))
