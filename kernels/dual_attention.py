"""Self-attention of one or two token streams:  y = softmax(q k^T * scale) v, per image and head.

Source: Vaswani et al., Attention Is All You Need, arXiv:1706.03762; two streams as in FusionReID, arXiv:2412.17239.
B images, N tokens (each stream has its own N), H heads, D head width; q, k, v packed as the projection leaves them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fusionreid.kernels._path import TRITON, capability, on_device_of, use_triton
from fusionreid.kernels.dual_attention_backward import backward
from fusionreid.kernels.dual_attention_forward import forward

LOG2_E = math.log2(math.e)
WIDEST_HEAD = 128  # of the kernels
# Tiles of queries on their way in the backward pass: without spills in both, by the registers each compiler finds.
STAGES = 2 if TRITON < (3, 9) else 3
HAS_TILES = torch.cpu._is_amx_tile_supported()  # a CPU without AMX is slower in torch's half-precision attention
Plan = dict[str, Any]


@overload
def dual_self_attention(qkv_a: Tensor, qkv_b: None = None, scale: float | None = None) -> Tensor: ...
@overload
def dual_self_attention(qkv_a: Tensor, qkv_b: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]: ...
def dual_self_attention(
    qkv_a: Tensor, qkv_b: Tensor | None = None, scale: float | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Each qkv is (B, N, 3, H, D); the answer (B, N, H * D), or a pair of them. `scale` is 1 / sqrt(D) unless given.

    Computed in the type of qkv, softmax and sums in float32. On a GPU qkv must be contiguous and D at most 128.
    """
    streams = [qkv_a] if qkv_b is None else [qkv_a, qkv_b]
    _check(streams)
    scale = qkv_a.shape[-1] ** -0.5 if scale is None else scale
    outputs = _on_gpu(streams, scale) if use_triton(qkv_a) else [_attend(qkv, scale) for qkv in streams]
    return outputs[0] if qkv_b is None else tuple(outputs)


def _check(streams: Sequence[Tensor]) -> None:
    for name, qkv in zip(("qkv_a", "qkv_b"), streams):
        if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.numel() == 0 or not qkv.is_floating_point():
            raise ValueError(
                f"dual_self_attention: {name} must be floating (B, N, 3, H, D), none of them 0, "
                f"got {tuple(qkv.shape)} {qkv.dtype}"
            )
    a, b = streams[0], streams[-1]
    if a.shape[0] != b.shape[0] or a.shape[2:] != b.shape[2:] or a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            "dual_self_attention: both streams must have the same images, heads, head width, type and device, "
            f"got {tuple(a.shape)} {a.dtype} {a.device} and {tuple(b.shape)} {b.dtype} {b.device}"
        )


def _attend(qkv: Tensor, scale: float) -> Tensor:
    dtype = qkv.dtype if HAS_TILES else torch.promote_types(qkv.dtype, torch.float32)
    query, key, value = qkv.to(dtype).permute(2, 0, 3, 1, 4)  # views (B, H, N, D)
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return y.transpose(1, 2).flatten(2).to(qkv.dtype)


def _on_gpu(streams: list[Tensor], scale: float) -> list[Tensor]:
    for name, qkv in zip(("qkv_a", "qkv_b"), streams):
        if not qkv.is_contiguous():
            raise ValueError(f"dual_self_attention: {name} must be contiguous, its strides are {qkv.stride()}")
    if streams[0].shape[-1] > WIDEST_HEAD:
        raise ValueError(f"dual_self_attention: heads are {streams[0].shape[-1]} wide, {WIDEST_HEAD} at most on a GPU")
    needs_grad = torch.is_grad_enabled() and any(qkv.requires_grad for qkv in streams)
    return _forward(streams, scale, needs_grad)[: len(streams)]


@torch.library.custom_op("fusionreid::dual_self_attention", mutates_args=())
def _forward(streams: Sequence[Tensor], scale: float, save: bool) -> list[Tensor]:
    """The outputs, then, if they are to be saved, the log2 of each query's sum of exponentials (B, H, N)."""
    results = _empty_results(streams, scale, save)
    outputs, sums = results[: len(streams)], results[len(streams) :] or results
    with on_device_of(streams[0]):
        grid, settings = _launch(streams, _forward_plan)
        forward[grid](
            streams[0], outputs[0], sums[0], streams[-1], outputs[-1], sums[-1],
            scale * LOG2_E, SAVE=save, num_warps=4, **settings,
        )  # fmt: skip
    return results


@_forward.register_fake
def _empty_results(streams: Sequence[Tensor], scale: float, save: bool) -> list[Tensor]:
    outputs = [qkv.new_empty(*qkv.shape[:2], qkv.shape[3] * qkv.shape[4]) for qkv in streams]
    sums = [qkv.new_empty(qkv.shape[0], qkv.shape[3], qkv.shape[1], dtype=torch.float32) for qkv in streams]
    return outputs + sums if save else outputs


@torch.library.custom_op("fusionreid::dual_self_attention_backward", mutates_args=())
def _backward(
    streams: Sequence[Tensor], outputs: Sequence[Tensor], sums: Sequence[Tensor], grads: Sequence[Tensor], scale: float
) -> list[Tensor]:
    results = [torch.empty_like(qkv) for qkv in streams]
    with on_device_of(streams[0]):
        grid, settings = _launch(streams, _backward_plan)
        backward[grid](
            streams[0], outputs[0], grads[0], sums[0], results[0],
            streams[-1], outputs[-1], grads[-1], sums[-1], results[-1], scale * LOG2_E, scale,
            STAGES=STAGES, num_warps=8, **settings,
        )  # fmt: skip
    return results


@_backward.register_fake
def _(streams: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(qkv) for qkv in streams]


def _save(ctx: Any, inputs: tuple[list[Tensor], float, bool], output: list[Tensor]) -> None:
    streams, ctx.scale, _ = inputs
    ctx.save_for_backward(*streams, *output)
    ctx.set_materialize_grads(False)  # the sums have none


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor], None, None]:
    saved = ctx.saved_tensors
    n = len(saved) // 3
    streams, outputs, sums = saved[:n], saved[n : 2 * n], saved[2 * n :]
    upstream = [torch.zeros_like(y) if grad is None else grad.contiguous() for grad, y in zip(grads, outputs)]
    return _backward(streams, outputs, sums, upstream, ctx.scale), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _launch(streams: Sequence[Tensor], plan: Callable[[int, int, int], Plan]) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and settings for both streams; `plan` is that of one by its tokens, padded head width, bytes per number."""
    images, _, _, heads, width = streams[0].shape
    block_d, size = max(16, triton.next_power_of_2(width)), streams[0].element_size()
    plans = [plan(qkv.shape[1], block_d, size) for qkv in streams]
    programs = [images * heads * own["TILES"] for own in plans]
    settings = {"H": heads, "D": width, "BLOCK_D": block_d, "STREAMS": len(streams), "programs_a": programs[0]}
    for letter, qkv, own in (("A", streams[0], plans[0]), ("B", streams[-1], plans[-1])):
        settings |= {f"N_{letter}": qkv.shape[1], **{f"{name}_{letter}": value for name, value in own.items()}}
    return (sum(programs),), settings


def _forward_plan(tokens: int, block_d: int, size: int) -> Plan:
    """ROWS queries at once; TILES programs share a head."""
    rows, blocks = (64 if size == 2 else 16), _blocks(tokens, (65, 129, 193) if _is_roomy() else (65, 129))
    keys = sum(length for _, length in blocks)
    most_keys, most_numbers = (256, 256 * 128) if _is_roomy() else (224, 224 * 64)
    if size == 2 and keys <= most_keys and keys * block_d <= most_numbers:
        return {"ROWS": rows, "BLOCKS": blocks, "TILES": 1, "RESIDENT": True}
    return {"ROWS": rows, "BLOCKS": ((0, 128 // size),), "TILES": triton.cdiv(tokens, rows), "RESIDENT": False}


def _blocks(tokens: int, apart: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Keys as blocks (first, size), sizes powers of two, three at most: 129 = 1 + 128, 211 in 128 + 64 + 32."""
    first = int(tokens in apart)
    sixteens = triton.cdiv(tokens - first, 16)
    while sixteens.bit_count() > 3:
        sixteens += sixteens & -sixteens
    blocks = []
    for bit in reversed(range(sixteens.bit_length())):
        if sixteens >> bit & 1:
            blocks.append((first, 16 << bit))
            first += 16 << bit
    return tuple(blocks)


def _backward_plan(tokens: int, block_d: int, size: int) -> Plan:
    first = int(tokens in (65, 129) and block_d <= 64)
    keys = max(16, triton.next_power_of_2(tokens - first))
    if size == 2 and keys * block_d <= 256 * 64 and _is_roomy():
        return {"ROWS": 32, "FIRST": first, "KEYS": keys, "TILES": 1, "RESIDENT": True}
    rows, keys = (32, 64) if size == 2 and _is_roomy() else (16, 32)
    tiles = triton.cdiv(tokens, keys) + triton.cdiv(tokens, rows)
    return {"ROWS": rows, "FIRST": 0, "KEYS": keys, "TILES": tiles, "RESIDENT": False}


def _is_roomy() -> bool:
    """Hopper and Blackwell of the data centre take the operands of a product from shared memory, not from registers."""
    return capability() // 10 in (9, 10)
