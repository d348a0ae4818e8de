"""Philox-4x32-10, random numbers without state: the same (key, counter) gives the same 128 bits everywhere.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
The key is (seed, epoch); the last counter word says what the bits are for.
"""

import torch
from torch import Tensor

ERASING_NOISE, AUGMENTATION, SAMPLING, DROP_PATH = range(4)  # purposes: the last counter word

WORD = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]  # int64 holding uint32


def philox(key: tuple[int, int], counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]) -> Words:
    """Four words of random bits per counter; the counter words broadcast against each other."""
    k0, k1 = key
    if not (0 <= k0 <= WORD and 0 <= k1 <= WORD):
        raise ValueError(f"philox: seed and epoch must lie in 0..{WORD}, got {key}")
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # The product wraps modulo 2^64, so its upper half is right although int64 reads it as signed.
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (odd >> 32 & WORD) ^ c1 ^ k0, odd & WORD
        c2, c3 = (even >> 32 & WORD) ^ c3 ^ k1, even & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    words = torch.broadcast_tensors(*(torch.as_tensor(c) for c in (c0, c1, c2, c3)))
    return words[0], words[1], words[2], words[3]


def below(bits: Tensor, bound: Tensor | int) -> Tensor:
    """Whole numbers 0..bound-1, bound < 2^31."""
    return bits * bound >> 32


def uniform(bits: Tensor) -> Tensor:
    """fp32 in the open interval (0, 1), in steps of 2^-23: exact, so no path can round it to 0 or 1."""
    return ((bits >> 9).float() + 0.5) * 2.0**-23
