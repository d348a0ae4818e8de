"""Tokens of one head in and out of a Triton program; STRIDE is the distance of two tokens, D the head's width."""

import triton
import triton.language as tl


@triton.jit
def load(
    ptr, first, N: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tokens first..first + SIZE, [SIZE, BLOCK_D]; zeros past column D and, not WHOLE, past token N."""
    token, column = first + tl.arange(0, SIZE), tl.arange(0, BLOCK_D)
    at = ptr + token[:, None] * STRIDE + column
    if WHOLE and D == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(token[:, None] < N) & (column < D), other=0.0)


@triton.jit
def store(
    ptr, x, first, N: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    token, column = first + tl.arange(0, SIZE), tl.arange(0, BLOCK_D)
    at = ptr + token[:, None] * STRIDE + column
    if WHOLE and D == BLOCK_D:
        tl.store(at, x.to(ptr.dtype.element_ty))
    else:
        tl.store(at, x.to(ptr.dtype.element_ty), mask=(token[:, None] < N) & (column < D))


@triton.jit
def load_token(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token in float32, [BLOCK_D]."""
    column = tl.arange(0, BLOCK_D)
    return tl.load(ptr + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def store_token(ptr, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    tl.store(ptr + column, x.to(ptr.dtype.element_ty), mask=column < D)
