"""Label-smoothed cross-entropy of all heads:  loss = mean_b (lse(z) - (1 - s) z[y] - s / K sum_k z[k]),  s smoothing.

lse(z) = log sum_k exp(z[k]), in one pass over a row; no array of soft targets. The derivative of a row's loss is
exp(z - lse) - s / K, less 1 - s at its label.
Source: Szegedy et al., Rethinking the Inception Architecture, arXiv:1512.00567. B images, K persons to tell apart.
"""

# Triton reads its own annotations.
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fusionreid.kernels._path import on_device_of, use_triton


def smoothed_cross_entropy(logits: Sequence[Tensor], persons: Tensor, smoothing: float = 0.1) -> Tensor:
    """Logits (B, K) per head and labels (B,) in 0..K-1 -> mean losses (heads,), in fp32 at least.

    On a GPU a label out of range makes the loss NaN.
    """
    shape = (len(persons), *logits[0].shape[1:]) if logits else (0, 0)
    for head, z in enumerate(logits):
        if z.shape != shape or z.ndim != 2 or not z.is_floating_point():
            raise ValueError(
                f"smoothed_cross_entropy: logits must be floating (B, K), alike in every head, with B = {len(persons)} "
                f"persons, got {tuple(z.shape)} {z.dtype} in head {head}"
            )
    if persons.ndim != 1 or 0 in shape or not 0 <= smoothing <= 1:
        raise ValueError(
            f"smoothed_cross_entropy: needs one head, image and class or more and smoothing in 0..1, "
            f"got logits {shape} in {len(logits)} heads, persons {tuple(persons.shape)}, smoothing {smoothing}"
        )
    if all(use_triton(z) for z in logits):
        rows = [z if z.stride(1) == 1 else z.contiguous() for z in logits]
        return _forward(rows, persons, smoothing)[0].sum(1)
    with torch.autocast(persons.device.type, enabled=False):
        rows = torch.cat(tuple(logits))  # (heads B, K): all heads in one call, which a small batch feels
        exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
        terms = F.cross_entropy(exact, persons.repeat(len(logits)), label_smoothing=smoothing, reduction="none")
        return terms.view(len(logits), -1).mean(1)


@triton.jit
def forward_kernel(logits, strides, persons_ptr, terms_ptr, lse_ptr, K, smoothing, BLOCK_K: tl.constexpr):
    """Grid (B, heads), a row each -> its share of the mean loss (heads, B) and its lse in two parts (2, heads, B)."""
    row, batch = tl.program_id(0), tl.num_programs(0)
    for head in tl.static_range(len(logits)):
        if tl.program_id(1) == head:
            z_ptr = logits[head] + row.to(tl.int64) * strides[head]
            label = tl.load(persons_ptr + row)
            highest, sums, plain = _sums(z_ptr, K, BLOCK_K)
            top = tl.max(highest, 0)
            rest = tl.log(tl.sum(sums * tl.exp(highest - top), 0))  # lse = top + rest, whose sum would round
            known = (label >= 0) & (label < K)
            own = tl.load(z_ptr + label, mask=known, other=0.0).to(tl.float32)
            loss = rest + (1 - smoothing) * (top - own)
            loss += tl.where(smoothing > 0, smoothing * (top - tl.sum(plain, 0) / K), 0.0)  # the sum may be -inf
            tl.store(terms_ptr + head * batch + row, tl.where(known, loss / batch, float("nan")))
            tl.store(lse_ptr + head * batch + row, top)
            tl.store(lse_ptr + (len(logits) + head) * batch + row, rest)


@triton.jit
def _sums(z_ptr, K, BLOCK_K: tl.constexpr):
    """Of every BLOCK_K-th logit of a row: the largest, the sum of exponentials relative to it, the sum; [BLOCK_K]."""
    highest = tl.full((BLOCK_K,), -1e30, tl.float32)  # finite: logits may be -inf
    sums = tl.zeros((BLOCK_K,), tl.float32)
    plain = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        z = tl.load(z_ptr + column, mask=column < K, other=float("-inf")).to(tl.float32)
        plain += tl.where(column < K, z, 0.0)
        larger = tl.where(z > highest, z, highest)
        sums = sums * tl.exp(highest - larger) + tl.exp(z - larger)
        highest = larger
    return highest, sums, plain


@triton.jit
def backward_kernel(logits, gradients, strides, persons_ptr, lse_ptr, upstream_ptr, head_stride, row_stride, K,
                    smoothing, BLOCK_K: tl.constexpr):  # fmt: skip
    """Grid (B, blocks of K, heads)."""
    row, batch = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    for head in tl.static_range(len(logits)):
        if tl.program_id(2) == head:
            z = tl.load(logits[head] + row.to(tl.int64) * strides[head] + column, mask=column < K, other=0.0)
            top = tl.load(lse_ptr + head * batch + row)
            rest = tl.load(lse_ptr + (len(logits) + head) * batch + row)
            slope = tl.exp(z.to(tl.float32) - top - rest) - smoothing / K
            slope -= tl.where(column == tl.load(persons_ptr + row), 1 - smoothing, 0.0)
            share = tl.load(upstream_ptr + head * head_stride + row * row_stride).to(tl.float32) / batch
            tl.store(gradients[head] + row.to(tl.int64) * K + column, share * slope, mask=column < K)


@torch.library.custom_op("fusionreid::smoothed_cross_entropy_forward", mutates_args=())
def _forward(logits: Sequence[Tensor], persons: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """terms (heads, B), whose sum is a head's loss, and lse (2, heads, B)."""
    terms, lse = outputs = _forward_outputs(logits, persons, smoothing)
    classes = logits[0].shape[1]
    with on_device_of(logits[0]):
        forward_kernel[len(persons), len(logits)](
            tuple(logits), tuple(z.stride(0) for z in logits), persons.contiguous(), terms, lse, classes, smoothing,
            **_launch(classes),
        )  # fmt: skip
    return outputs


@_forward.register_fake
def _forward_outputs(logits: Sequence[Tensor], persons: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    terms = persons.new_empty(len(logits), len(persons), dtype=torch.float32)
    return terms, terms.new_empty(2, *terms.shape)


@torch.library.custom_op("fusionreid::smoothed_cross_entropy_backward", mutates_args=())
def _backward(
    upstream: Tensor, logits: Sequence[Tensor], persons: Tensor, lse: Tensor, smoothing: float
) -> list[Tensor]:
    """The gradient of every head, given that of its terms (heads, B)."""
    gradients = [z.new_empty(z.shape) for z in logits]
    rows, classes = logits[0].shape
    settings = _launch(classes)
    with on_device_of(logits[0]):
        backward_kernel[rows, triton.cdiv(classes, settings["BLOCK_K"]), len(logits)](
            tuple(logits), tuple(gradients), tuple(z.stride(0) for z in logits), persons.contiguous(), lse, upstream,
            *upstream.stride(), classes, smoothing, **settings,
        )  # fmt: skip
    return gradients


@_backward.register_fake
def _(upstream: Tensor, logits: Sequence[Tensor], persons: Tensor, lse: Tensor, smoothing: float) -> list[Tensor]:
    return [z.new_empty(z.shape) for z in logits]


def _launch(classes: int) -> dict[str, int]:
    """Eight logits per thread in flight; a row of a usual data set in one block."""
    block = max(128, min(4096, triton.next_power_of_2(classes)))
    return {"BLOCK_K": block, "num_warps": max(1, block // 256)}


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, persons, ctx.smoothing = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(persons, output[1], *logits)


def _differentiate(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[list[Tensor] | None, None, None]:
    persons, lse, *logits = ctx.saved_tensors
    return None if upstream is None else _backward(upstream, logits, persons, lse, ctx.smoothing), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
