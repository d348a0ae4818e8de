"""dual_cross_attention: absorbed algebra and kernels against projected keys and values, compile, autocast."""

import pytest
import torch
from torch import Tensor

from fusionreid.kernels import ClassStream, dual_cross_attention, reference
from tests.numerics import assert_as_accurate

SHAPES = [(2, 1, 1, 4, 8), (3, 15, 2, 16, 24), (2, 16, 12, 4, 48), (2, 17, 3, 48, 96), (1, 131, 2, 33, 66)]
NAMES = ("query", "tokens", "norm_weight", "norm_bias", "key_weight", "value_weight")


@pytest.fixture(params=["plain", "kernels"])
def path(request: pytest.FixtureRequest) -> None:
    if request.param == "kernels":
        request.getfixturevalue("triton_path")


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


def check_accuracy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stream = make_stream(*shape, dtype=dtype)
    upstream = torch.randn(shape[0], shape[2] * shape[3]).to(dtype)
    out = with_gradients(dual_cross_attention, stream, upstream)
    low = with_gradients(reference.dual_cross_attention, stream, upstream)
    gold = with_gradients(reference.dual_cross_attention, cast(stream, torch.double), upstream)
    assert out["norm_bias"].count_nonzero() == 0
    for name, value in out.items():
        assert value.dtype == dtype
        assert_as_accurate(name, value, low[name], gold[name])
    again = with_gradients(dual_cross_attention, stream, upstream)
    torch.testing.assert_close(again, out, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_accurate_as_plain_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_accuracy(shape, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_is_exact_in_double(shape: tuple[int, ...]) -> None:
    stream, upstream = make_stream(*shape), torch.randn(shape[0], shape[2] * shape[3], dtype=torch.double)
    out = with_gradients(dual_cross_attention, stream, upstream)
    gold = with_gradients(reference.dual_cross_attention, stream, upstream)
    torch.testing.assert_close(out, gold, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("widths", [(20, 20), (12, 20)])
def test_two_streams_are_two_single_streams(widths: tuple[int, int]) -> None:
    a, b = (cast(make_stream(2, n, 3, 4, width), torch.float32) for n, width in zip((5, 19), widths))
    leaves = [t.requires_grad_() for stream in (a, b) for t in stream if isinstance(t, Tensor)]
    both = dual_cross_attention(a, b, scale=0.3)
    alone = dual_cross_attention(a, scale=0.3), dual_cross_attention(b, scale=0.3)
    torch.testing.assert_close(both, alone, rtol=0, atol=0)
    torch.testing.assert_close(both, reference.dual_cross_attention(a, b, scale=0.3))
    gradients = [torch.autograd.grad(out, leaves, alone, retain_graph=True) for out in (both, alone)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    (unused,) = torch.autograd.grad(both[0].sum(), [b.tokens], allow_unused=True)
    assert unused is None or not unused.count_nonzero()


@pytest.mark.usefixtures("path")
def test_tokens_may_be_strided_and_a_wrong_number_stays_in_its_image() -> None:
    stream, upstream = cast(make_stream(2, 20, 3, 4, 12), torch.float32), torch.randn(2, 12)
    stream.tokens[1, 17, 3] = torch.nan
    for tokens in (stream.tokens[:, 1:], stream.tokens.mT.contiguous().mT):
        strided, copied = (stream._replace(tokens=t) for t in (tokens, tokens.contiguous()))
        out, expected = (with_gradients(dual_cross_attention, s, upstream) for s in (strided, copied))
        torch.testing.assert_close(out, expected, equal_nan=True)
        assert out["context"][1].isnan().all()
        assert all(out[name][0].isfinite().all() for name in ("context", "tokens", "query"))


def test_reference_has_the_right_gradient() -> None:
    stream = make_stream(2, 4, 2, 3, 5)

    def context(*tensors: Tensor) -> Tensor:
        return reference.dual_cross_attention(stream._replace(**dict(zip(NAMES, tensors))))

    torch.autograd.gradcheck(context, [getattr(stream, name).requires_grad_() for name in NAMES])


@pytest.mark.usefixtures("path")
def test_compiles_to_one_graph() -> None:
    streams = [cast(make_stream(2, n, 3, 4, 12), torch.float32) for n in (5, 9)]
    compiled = torch.compile(dual_cross_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*streams), dual_cross_attention(*streams))
    out, expected = (with_gradients(op, streams[0], torch.ones(2, 12)) for op in (compiled, dual_cross_attention))
    torch.testing.assert_close(out, expected)


@pytest.mark.usefixtures("path")
def test_autocast_changes_the_query_alone() -> None:
    """The op computes alike whatever autocast says: only what reaches it is rounded."""
    stream = cast(make_stream(2, 9, 3, 4, 12), torch.float32)
    rounded = stream._replace(query=stream.query.bfloat16())
    with torch.autocast(stream.tokens.device.type, dtype=torch.bfloat16):
        out = dual_cross_attention(stream)
        low = dual_cross_attention(rounded)
    torch.testing.assert_close(out, dual_cross_attention(stream), rtol=0, atol=0)
    torch.testing.assert_close(low, dual_cross_attention(rounded), rtol=0, atol=0)
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("field", "shape", "message"),
    [
        ("tokens", (2, 0, 12), r"one image, head and token or more"),
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


@pytest.mark.parametrize("field", NAMES)
def test_other_devices_and_whole_numbers_are_refused(field: str) -> None:
    stream = make_stream(2, 5, 3, 4, 12)
    for wrong in (getattr(stream, field).long(), getattr(stream, field).to("meta")):
        with pytest.raises(ValueError, match="must be floating and on"):
            dual_cross_attention(stream._replace(**{field: wrong}))


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan, 1e39])
def test_numbers_that_are_not_finite_are_refused(wrong: float) -> None:
    stream = make_stream(2, 5, 3, 4, 12)
    with pytest.raises(ValueError, match="scale must be finite in float32, got"):
        dual_cross_attention(stream, scale=wrong)
    for eps in (wrong, -1e-5):
        with pytest.raises(ValueError, match="norm_eps must be finite and not below 0, got"):
            dual_cross_attention(stream._replace(norm_eps=eps))


def test_streams_of_different_batches_are_refused() -> None:
    for other in (make_stream(1, 5, 3, 4, 12), make_stream(2, 5, 3, 4, 12, torch.float32)):
        with pytest.raises(ValueError, match="same images, heads and head width, and dtype and device of tokens"):
            dual_cross_attention(make_stream(2, 5, 3, 4, 12), other)
