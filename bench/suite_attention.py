"""Attention of both streams: the encoding unit's self-attention and the fusion unit's class attention.

B images, N tokens per stream, H heads, D head width, C width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from bench.builds import Launch
from bench.timing import TOLERANCE, Case, Settings, Work
from fusionreid.kernels import ClassStream, dual_cross_attention, dual_self_attention
from fusionreid.kernels.dual_attention import takes

SOURCES = ("kernels/dual_attention.py", "kernels/class_attention.py")
# images, tokens of the CNN stream and of the Transformer stream without the class token, heads, head width
SIZES = {"quick": (2, 4, 6, 2, 8), "default": (8, 128, 210, 12, 64), "full": (128, 128, 210, 12, 64)}
Pair = tuple[Tensor, ...]


def cases(settings: Settings) -> list[Case]:
    """List the cases of a size."""
    images, *tokens, heads, width = SIZES[settings.size]
    dtype = str(settings.dtype).removeprefix("torch.")
    both = [1 + n for n in tokens]
    found = []
    for name, setup, lengths in (
        ("self-attention of both streams", self_attention, both),
        ("self-attention of one stream", self_attention, both[1:]),
        ("class attention of both streams", class_attention, tokens),
    ):
        shape = f"B {images}, N {' and '.join(map(str, lengths))}, H {heads}, D {width}, {dtype}"
        found.append(Case(f"{name}, forward", shape, partial(setup, settings, lengths, False)))
        found.append(Case(f"{name}, backward", shape, partial(setup, settings, lengths, True)))
    return found


def launches() -> Iterator[Launch]:
    """List the kernels' launches at the sizes of the model; the last ones are those of 384 x 128 pixels."""
    images, *_, heads, width = SIZES["full"]
    for tokens in (129, 211, 193):
        yield from _self_attention_launches(images, tokens, heads, width)
    for dtype in (torch.bfloat16, torch.float32):
        for lengths in ((128, 210), (192, 310)):
            yield from class_launches(images, lengths, heads, width, dtype)


def _self_attention_launches(images: int, tokens: int, heads: int, width: int) -> Iterator[Launch]:
    qkv = torch.zeros(1, tokens, 3, heads, width, dtype=torch.bfloat16)
    out, lse = qkv[:, :, 0].flatten(2), torch.zeros(1, heads, tokens)
    forward, backward = torch.ops.fusionreid.dual_self_attention, torch.ops.fusionreid.dual_self_attention_backward
    name, bytes_moved, operations = (
        f"self-attention, N {tokens}",
        images * qkv.nbytes,
        images * 4 * out.numel() * tokens,
    )

    def launch(op: Callable[..., object], *arguments: object) -> object:
        return op(*arguments) if takes(qkv) else None  # on other GPUs torch's kernels run

    yield Launch(f"{name}, forward", partial(launch, forward, qkv, 1.0), bytes_moved * 4 / 3, operations, images)
    yield Launch(
        f"{name}, backward",
        partial(launch, backward, qkv, out, out, lse, 1.0),
        bytes_moved * 8 / 3,
        2.5 * operations,
        images,
    )


def class_launches(images: int, lengths: Sequence[int], heads: int, width: int, dtype: torch.dtype) -> Iterator[Launch]:
    """List the launches of class attention: tokens behind a class token, absorbed queries with heads outermost."""
    inner = heads * width
    tokens = [torch.zeros(1, 1 + n, inner, dtype=dtype)[:, 1:] for n in lengths]
    absorbed = [torch.zeros(heads, 1, inner, dtype=dtype).transpose(0, 1) for _ in lengths]
    vectors = [torch.zeros(inner, dtype=dtype) for _ in lengths]
    forward, backward = torch.ops.fusionreid.class_attention, torch.ops.fusionreid.class_attention_backward
    saved = [
        torch.zeros(1, *shape)
        for n in lengths
        for shape in ((heads, inner), (n, 16), (2, n), (3, 16))  # as `Saved` has them
    ]
    name = f"class attention, N {' and '.join(map(str, lengths))}, {str(dtype).removeprefix('torch.')}"
    moved = images * sum(t.numel() * t.element_size() for t in tokens)
    small = images * sum(t.nbytes for t in absorbed)
    operations = images * sum(4 * heads * inner * n for n in lengths)
    yield Launch(
        f"{name}, forward",
        lambda: forward(tokens, absorbed, vectors, vectors, [1e-5, 1e-5], 1.0, True),
        moved + 2 * small,
        operations,
        images,
    )
    yield Launch(
        f"{name}, backward",
        lambda: backward(tokens, absorbed, vectors, saved, absorbed, 1.0),
        2 * moved + 4 * small,
        2 * operations,
        images,
    )


@contextmanager
def self_attention(settings: Settings, lengths: Sequence[int], backward: bool) -> Iterator[Work]:
    """Prepare self-attention and its alternatives."""
    images, *_, heads, width = SIZES[settings.size]
    inputs = [_random(settings, images, n, 3, heads, width, grad=backward) for n in lengths]
    one_stream: dict[str, Callable[[Tensor], Tensor]] = {
        "SDPA on views": sdpa_on_views,
        "SDPA on copies": sdpa_on_copies,
        "plain, as published": plain_self_attention,
    }
    if settings.device.type == "cuda":  # what torch picks is not always the fastest
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            one_stream[f"SDPA on views, {backend.name.split('_')[0].lower()}"] = partial(_with_backend, backend)
    functions: dict[str, Callable[..., Pair]] = {"ours": lambda *qkv: _as_tuple(dual_self_attention(*qkv))}
    for name, function in one_stream.items():
        functions[name] = lambda *qkv, function=function: tuple(function(x) for x in qkv)
    if settings.compile:
        functions["plain, compiled"] = torch.compile(functions["plain, as published"])
        functions["FlexAttention, compiled"] = torch.compile(lambda *qkv: tuple(map(flex, qkv)))
    operations = sum(4 * images * heads * width * n**2 for n in lengths)
    operations = (
        operations * 5 // 2 if backward else operations
    )  # five products: the scores once more, and two for each
    yield _work(settings, functions, inputs, inputs, operations, backward)


@contextmanager
def class_attention(settings: Settings, lengths: Sequence[int], backward: bool) -> Iterator[Work]:
    """Prepare class attention and its alternatives."""
    images, *_, heads, width = SIZES[settings.size]
    inner = heads * width
    streams, inputs = [], []
    for n in lengths:
        tensors = [
            _random(settings, images, heads, width),
            _random(settings, images, n, inner),
            _random(settings, inner),
            _random(settings, inner),
            *(_random(settings, inner, inner, deviation=inner**-0.5) for _ in range(2)),
        ]
        query, x, weight, bias, key_weight, value_weight = tensors
        streams.append(ClassStream(query, x, weight, bias, 1e-5, key_weight, value_weight))
        inputs += [query, x, weight, key_weight, value_weight]  # the bias has no gradient: it cancels
    for tensor in inputs:
        tensor.requires_grad_(backward)
    functions: dict[str, Callable[..., Pair]] = {
        "ours": dual_cross_attention,
        "LayerNorm, K and V, SDPA": lambda a, b: (projected_class_attention(a), projected_class_attention(b)),
    }
    if settings.compile:
        functions["LayerNorm, K and V, SDPA, compiled"] = torch.compile(functions["LayerNorm, K and V, SDPA"])
    operations = sum(4 * images * inner * (heads * n + inner) for n in lengths)  # weights on the class token's side
    operations *= 2 if backward else 1
    yield _work(settings, functions, streams, inputs, operations, backward)


def sdpa_on_views(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Attend by torch's own op on views of the packed projection."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)


def sdpa_on_copies(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Attend by torch's own op on contiguous copies."""
    return sdpa_on_views(qkv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4), scale)


def plain_self_attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Attend as the published module does."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) * (qkv.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def projected_class_attention(stream: ClassStream, scale: float | None = None) -> Tensor:
    """Attend with keys and values of every token."""
    heads = stream.query.shape[1:]
    keys = F.layer_norm(stream.tokens, stream.norm_weight.shape, stream.norm_weight, stream.norm_bias, stream.norm_eps)
    keys = F.linear(keys, stream.key_weight).unflatten(-1, heads).transpose(1, 2)  # (B, H, N, D)
    values = F.linear(stream.tokens, stream.value_weight).unflatten(-1, heads).transpose(1, 2)
    return F.scaled_dot_product_attention(stream.query[:, :, None], keys, values, scale=scale).flatten(1)


def flex(qkv: Tensor) -> Tensor:
    """Attend by FlexAttention."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return flex_attention(query, key, value).transpose(1, 2).flatten(2)


def _with_backend(backend: SDPBackend, qkv: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa_on_views(qkv)


def _as_tuple(result: Tensor | Pair) -> Pair:
    return (result,) if isinstance(result, Tensor) else result


def _random(settings: Settings, *shape: int, deviation: float = 1.0, grad: bool = False) -> Tensor:
    values = (deviation * torch.randn(shape)).to(settings.device, settings.dtype)
    return values.requires_grad_(grad)


def _work(
    settings: Settings,
    functions: dict[str, Callable[..., Pair]],
    arguments: Sequence[object],
    inputs: Sequence[Tensor],
    operations: float,
    backward: bool,
) -> Work:
    """Forward, or backward alone: its inputs are the results of a forward pass made before."""
    with torch.no_grad():
        upstream = [torch.randn_like(out) for out in functions["ours"](*arguments)]
    read, written = (sum(t.nbytes for t in tensors) for tensors in (inputs, upstream))

    def forward(function: Callable[..., Pair]) -> Sequence[Tensor]:
        with torch.no_grad():
            return function(*arguments)

    if not backward:
        providers = {name: partial(forward, function) for name, function in functions.items()}
        return Work(providers, TOLERANCE[settings.dtype], read + written, operations)
    results = {name: function(*arguments) for name, function in functions.items()}
    providers = {
        name: partial(torch.autograd.grad, out, inputs, upstream, retain_graph=True) for name, out in results.items()
    }
    return Work(providers, TOLERANCE[settings.dtype], 2 * (read + written), operations)
