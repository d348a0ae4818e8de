"""Normal noise for an erased rectangle, without state: the same on every device, whatever else is in the batch.

    z = Phi^-1((u + 1/2) / 65536),  u the 16 bits of a value in
    Philox-4x64-10(key (seed | epoch << 32, 0), counter (n, index, 0, purpose))

A row of the image is cut into blocks of 16 values, three per pixel. Those that the rectangle touches are numbered row
by row from n = 1, and drawn whole. z takes 65,536 values between -4.325 and 4.325, of variance 0.99998 and fourth
moment 2.9991 (a normal's are 1 and 3). Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
numpy has this generator in C, hence its 64 bits; it counts before it draws, hence from 1.
"""

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from fusionreid.kernels.philox import ERASING_NOISE, WORD

LEVELS = 1 << 16
PURPOSE = tl.constexpr(ERASING_NOISE)
# z / x by powers of -log2(1 - x^2), x = 2 u / 65536 - 1: within 5 ulp of the quantile at all levels (least squares,
# weighted anew until the largest relative errors were equal).
A0, A1, A2, A3, A4, A5, A6, A7, A8, A9, A10, A11 = map(tl.constexpr, (
    1.253314, 0.22743508, 0.007842477, -0.0010955322, -4.2507992e-05, 9.587707e-06,
    1.000566e-06, -3.2057474e-07, 3.235873e-08, -1.7221676e-09, 4.8876177e-11, -5.8614474e-13,
))  # fmt: skip


def key_of(seed: int, epoch: int) -> int:
    if not (0 <= seed <= WORD and 0 <= epoch <= WORD):
        raise ValueError(f"augment: seed and epoch must lie in 0..{WORD}, got {seed} and {epoch}")
    return seed | epoch << 32


class Noise:
    """The noise of an epoch, on a CPU."""

    def __init__(self, key: int, dtype: torch.dtype) -> None:
        """`dtype` of the values, float32 or float64."""
        self._generator = np.random.Philox(key=key, counter=0)
        self._state = self._generator.state
        self._quantiles = quantiles(dtype).numpy()

    def rectangle(self, index: int, left: int, rows: int, cols: int) -> np.ndarray:
        """(rows, 3 cols) for the pixels from column `left` on of the image at this position of the epoch."""
        first, last = 3 * left // 16, -(-3 * (left + cols) // 16)
        self._state["state"]["counter"][:] = 0, index, 0, ERASING_NOISE
        self._generator.state = self._state  # 1 us; a new generator takes 8
        levels = self._generator.random_raw(rows * (last - first) * 4).view(np.uint16).reshape(rows, -1)
        values: np.ndarray = self._quantiles.take(levels[:, 3 * left - 16 * first :][:, : 3 * cols], mode="clip")
        return values


@cache
def quantiles(dtype: torch.dtype) -> torch.Tensor:
    """Of the standard normal, in the middle of every level."""
    return torch.special.ndtri((torch.arange(LEVELS, dtype=torch.float64, device="cpu") + 0.5) / LEVELS).to(dtype)


@triton.jit
def noise(key, index, row, block, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """(ROWS, 16 BLOCKS) values of the blocks numbered row (ROWS, 1) + block (1, BLOCKS), int32."""
    counter = (row + block).to(tl.uint64)
    zero = counter * 0
    a, b, c, d = tl.philox(key, counter, zero + index, zero, zero + PURPOSE)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # (ROWS, BLOCKS, 2, 2), in the order of their bits once flat
    halves = tl.join((words & 0xFFFFFFFF).to(tl.uint32), (words >> 32).to(tl.uint32))
    levels = tl.join(halves & 0xFFFF, halves >> 16)
    return _quantile(levels.reshape(ROWS, 16 * BLOCKS))


@triton.jit
def _quantile(level):
    """Of the standard normal at (level + 1/2) / 65536, by a polynomial."""
    x = (2 * level.to(tl.int32) - 65535).to(tl.float32) * (1 / 65536)
    w = -tl.log2((1 - x) * (1 + x))
    z = A7 + w * (A8 + w * (A9 + w * (A10 + w * A11)))
    return x * (A0 + w * (A1 + w * (A2 + w * (A3 + w * (A4 + w * (A5 + w * (A6 + w * z)))))))
