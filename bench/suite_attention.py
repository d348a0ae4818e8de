"""Attention of both streams: the encoding unit's self-attention and the fusion unit's class attention.

B images, N tokens per stream, H heads, D head width, C width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import TOLERANCE, Case, Settings, Work
from kernels import ClassStream, dual_cross_attention, dual_self_attention

SOURCES = ("kernels/dual_attention.py", "kernels/class_attention.py")
# images, tokens of the CNN stream and of the Transformer stream without the class token, heads, head width
SIZES = {"quick": (2, 4, 6, 2, 8), "default": (8, 128, 210, 12, 64), "full": (128, 128, 210, 12, 64)}
Pair = tuple[Tensor, Tensor]


def cases(settings: Settings) -> list[Case]:
    images, *tokens, heads, width = SIZES[settings.size]
    dtype = str(settings.dtype).removeprefix("torch.")
    found = []
    for name, setup, more in (("self-attention", self_attention, 1), ("class attention", class_attention, 0)):
        shape = f"B {images}, N {tokens[0] + more} and {tokens[1] + more}, H {heads}, D {width}, {dtype}"
        found.append(Case(f"{name}, forward", shape, partial(setup, settings, False)))
        found.append(Case(f"{name}, forward and backward", shape, partial(setup, settings, True)))
    return found


@contextmanager
def self_attention(settings: Settings, backward: bool) -> Iterator[Work]:
    images, *tokens, heads, width = SIZES[settings.size]
    inputs = [_random(settings, images, 1 + n, 3, heads, width, grad=backward) for n in tokens]
    functions: dict[str, Callable[[Tensor, Tensor], Pair]] = {
        "ours": dual_self_attention,
        "SDPA on views": lambda a, b: (sdpa_on_views(a), sdpa_on_views(b)),
        "SDPA on copies": lambda a, b: (sdpa_on_copies(a), sdpa_on_copies(b)),
        "plain, as published": lambda a, b: (plain_self_attention(a), plain_self_attention(b)),
    }
    if settings.device.type == "cuda":  # what torch picks is not always the fastest
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            functions[f"SDPA on views, {backend.name.split('_')[0].lower()}"] = partial(_with_backend, backend)
    if settings.compile:
        functions["plain, compiled"] = torch.compile(functions["plain, as published"])
    operations = sum(4 * images * heads * width * (1 + n) ** 2 for n in tokens)
    yield _work(settings, functions, inputs, inputs, operations * (3.5 if backward else 1), backward)


@contextmanager
def class_attention(settings: Settings, backward: bool) -> Iterator[Work]:
    images, *tokens, heads, width = SIZES[settings.size]
    inner = heads * width
    streams, inputs = [], []
    for n in tokens:
        tensors = [_random(settings, images, heads, width), _random(settings, images, n, inner),
                   _random(settings, inner), _random(settings, inner),
                   *(_random(settings, inner, inner, deviation=inner**-0.5) for _ in range(2))]  # fmt: skip
        query, x, weight, bias, key_weight, value_weight = tensors
        streams.append(ClassStream(query, x, weight, bias, 1e-5, key_weight, value_weight))
        inputs += [query, x, weight, key_weight, value_weight]  # the bias has no gradient: it cancels
    for tensor in inputs:
        tensor.requires_grad_(backward)
    functions: dict[str, Callable[[ClassStream, ClassStream], Pair]] = {
        "ours": dual_cross_attention,
        "LayerNorm, K and V, SDPA": lambda a, b: (projected_class_attention(a), projected_class_attention(b)),
    }
    if settings.compile:
        functions["LayerNorm, K and V, SDPA, compiled"] = torch.compile(functions["LayerNorm, K and V, SDPA"])
    operations = sum(4 * images * inner * (heads * n + inner) for n in tokens)  # weights on the class token's side
    yield _work(settings, functions, streams, inputs, operations * (3 if backward else 1), backward)


def sdpa_on_views(qkv: Tensor, scale: float | None = None) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)


def sdpa_on_copies(qkv: Tensor, scale: float | None = None) -> Tensor:
    return sdpa_on_views(qkv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4), scale)


def plain_self_attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """As the published module computes it."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) * (qkv.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def projected_class_attention(stream: ClassStream, scale: float | None = None) -> Tensor:
    """With keys and values of every token."""
    heads = stream.query.shape[1:]
    keys = F.layer_norm(stream.tokens, stream.norm_weight.shape, stream.norm_weight, stream.norm_bias, stream.norm_eps)
    keys = F.linear(keys, stream.key_weight).unflatten(-1, heads).transpose(1, 2)  # (B, H, N, D)
    values = F.linear(stream.tokens, stream.value_weight).unflatten(-1, heads).transpose(1, 2)
    return F.scaled_dot_product_attention(stream.query[:, :, None], keys, values, scale=scale).flatten(1)


def _with_backend(backend: SDPBackend, a: Tensor, b: Tensor) -> Pair:
    with sdpa_kernel(backend):
        return sdpa_on_views(a), sdpa_on_views(b)


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
    with torch.no_grad():
        upstream = [torch.randn_like(out) for out in functions["ours"](*arguments)]

    def call(function: Callable[..., Pair]) -> Sequence[Tensor]:
        with nullcontext() if backward else torch.no_grad():
            out = function(*arguments)
        return (*out, *torch.autograd.grad(out, inputs, upstream)) if backward else out

    read, written = (sum(t.nbytes for t in tensors) for tensors in (inputs, upstream))
    moved = read + written + backward * 2 * (read + written)  # inputs and results again, their gradients
    providers = {name: partial(call, function) for name, function in functions.items()}
    return Work(providers, TOLERANCE[settings.dtype], moved, operations)
