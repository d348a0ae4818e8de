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

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def smoothed_cross_entropy(logits: Sequence[Tensor], persons: Tensor, smoothing: float = 0.1) -> Tensor:
    """Mean loss of each head, (heads,) in float32 at least, from logits (B, K) per head and int64 labels (B,).

    On a GPU a label outside 0..K-1 makes the loss NaN. Raises ValueError where a shape, dtype, device or the smoothing
    is wrong.
    """
    shape = (len(persons), *logits[0].shape[1:]) if logits else (0, 0)
    for head, z in enumerate(logits):
        if z.shape != shape or z.ndim != 2 or not z.is_floating_point() or z.device != persons.device:
            raise ValueError(
                f"smoothed_cross_entropy: logits must be floating (B, K), alike in every head, with B = {len(persons)} "
                f"persons and on their device, {persons.device}, got {tuple(z.shape)} {z.dtype} on {z.device} in head "
                f"{head}"
            )
    if persons.ndim != 1 or persons.dtype != torch.int64:
        raise ValueError(
            f"smoothed_cross_entropy: persons must be (B,) int64, got {tuple(persons.shape)} {persons.dtype}"
        )
    if 0 in shape or not 0 <= smoothing <= 1:
        raise ValueError(
            f"smoothed_cross_entropy: needs one head, image and class or more and smoothing in 0..1, "
            f"got logits {shape} in {len(logits)} heads, smoothing {smoothing}"
        )
    if all(map(use_triton, logits)):
        losses: Tensor = _OnGpu.apply(persons, smoothing, *logits)
        return losses
    with torch.autocast("cuda" if persons.is_cuda else "cpu", enabled=False):
        rows = torch.cat(tuple(logits))  # (heads B, K): all heads in one call, which a small batch feels
        exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
        terms = F.cross_entropy(exact, persons.repeat(len(logits)), label_smoothing=smoothing, reduction="none")
        return terms.view(len(logits), -1).mean(1)


class _OnGpu(torch.autograd.Function):
    """Joins the two ops. Registered with the forward op, a list of tensors would be flattened in Python every time."""

    @staticmethod
    def forward(ctx: Any, persons: Tensor, smoothing: float, *logits: Tensor) -> Tensor:
        rows = [z if z.stride(1) == 1 else z.contiguous() for z in logits]
        terms, lse = _forward(rows, persons, smoothing)
        ctx.smoothing = smoothing
        ctx.save_for_backward(persons, lse, *rows)
        return terms.sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        persons, lse, *rows = ctx.saved_tensors
        return None, None, *_backward(upstream, rows, persons, lse, ctx.smoothing)


@triton.jit
def forward_kernel(logits, strides, persons_ptr, terms_ptr, lse_ptr, K, smoothing, BLOCK_K: tl.constexpr):
    """Grid (B, heads), a row each -> its share of the mean loss (heads, B) and its lse in two parts (2, heads, B)."""
    row, batch = tl.program_id(0), tl.num_programs(0)
    for head in tl.static_range(len(logits)):
        if tl.program_id(1) == head:
            z_ptr = logits[head] + row.to(tl.int64) * strides[head]
            label = tl.load(persons_ptr + row)
            highest, sums, mean = _sums(z_ptr, K, BLOCK_K)
            top = tl.max(highest, 0)
            rest = tl.log(tl.sum(sums * tl.exp(highest - top), 0))  # lse = top + rest, whose sum would round
            known = (label >= 0) & (label < K)
            own = tl.load(z_ptr + label, mask=known, other=0.0).to(tl.float32)
            loss = rest + (1 - smoothing) * (top - own)
            loss += tl.where(smoothing > 0, smoothing * (top - tl.sum(mean, 0)), 0.0)  # the mean may be -inf
            tl.store(terms_ptr + head * batch + row, tl.where(known, loss / batch, float("nan")))
            tl.store(lse_ptr + head * batch + row, top)
            tl.store(lse_ptr + (len(logits) + head) * batch + row, rest)


@triton.jit
def _sums(z_ptr, K, BLOCK_K: tl.constexpr):
    """The largest of every BLOCK_K-th logit of a row, and the sums of exp relative to it and of z / K; [BLOCK_K]."""
    highest = tl.full((BLOCK_K,), LOWEST, tl.float32)  # finite: logits may be -inf
    sums = tl.zeros((BLOCK_K,), tl.float32)
    mean = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        z = tl.load(z_ptr + column, mask=column < K, other=float("-inf")).to(tl.float32)
        mean += tl.where(column < K, z / K, 0.0)  # which can't overflow
        larger = tl.where(z > highest, z, highest)
        sums = sums * tl.exp(highest - larger) + tl.exp(z - larger)
        highest = larger
    return highest, sums, mean


@triton.jit
def backward_kernel(logits, gradients, strides, persons_ptr, lse_ptr, upstream_ptr, head_stride, K, smoothing,
                    BLOCK_K: tl.constexpr):  # fmt: skip
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
            share = tl.load(upstream_ptr + head * head_stride).to(tl.float32) / batch
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
    """The gradient of every head's logits, given that of its loss, (heads,)."""
    gradients = [z.new_empty(z.shape) for z in logits]
    rows, classes = logits[0].shape
    settings = _launch(classes)
    with on_device_of(logits[0]):
        backward_kernel[rows, triton.cdiv(classes, settings["BLOCK_K"]), len(logits)](
            tuple(logits), tuple(gradients), tuple(z.stride(0) for z in logits), persons.contiguous(), lse, upstream,
            upstream.stride(0), classes, smoothing, **settings,
        )  # fmt: skip
    return gradients


@_backward.register_fake
def _(upstream: Tensor, logits: Sequence[Tensor], persons: Tensor, lse: Tensor, smoothing: float) -> list[Tensor]:
    return [z.new_empty(z.shape) for z in logits]


def _launch(classes: int) -> dict[str, int]:
    """Eight logits per thread in flight; a row of a usual data set in one block."""
    block = max(128, min(4096, triton.next_power_of_2(classes)))
    return {"BLOCK_K": block, "num_warps": max(1, block // 256)}
