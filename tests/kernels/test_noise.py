"""The noise of erased rectangles: its bits, its distribution, and the polynomial that a GPU has for the quantile."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fusionreid.kernels.noise import Noise, _quantile, noise, quantiles
from fusionreid.kernels.philox import WORD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _draw(out_ptr, key, index, blocks_per_row, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    row, block = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCKS)[None, :]
    drawn = noise(key, index, row * blocks_per_row + 1, block, ROWS, BLOCKS)
    tl.store(out_ptr + row * (16 * BLOCKS) + tl.arange(0, 16 * BLOCKS)[None, :], drawn)


@triton.jit
def _quantiles(out_ptr, LEVELS: tl.constexpr):
    level = tl.arange(0, LEVELS)
    tl.store(out_ptr + level, _quantile(level))


@triton.jit
def _bits(out_ptr):
    zero = tl.zeros([1], tl.uint64)
    words = tl.philox(0, zero, zero, zero, zero)
    for word in tl.static_range(4):
        tl.store(out_ptr + word + tl.arange(0, 1), words[word].to(tl.int64, bitcast=True))


def draws(count: int, index: int = 0, seed: int = 3, epoch: int = 0) -> torch.Tensor:
    """(count, 3): a rectangle one pixel wide."""
    return torch.from_numpy(Noise(seed | epoch << 32, torch.float64).rectangle(index, 0, count, 1))


def test_known_answer_of_the_authors():
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    before = np.random.Philox(key=0, counter=2**256 - 1)  # counts before it draws
    assert before.random_raw(4).tolist() == expected
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    _bits[(1,)](out)
    assert out.cpu().numpy().view(np.uint64).tolist() == expected


@pytest.mark.parametrize(("seed", "epoch", "index"), [(0, 0, 0), (1111, 7, 12_345), (WORD, 2**31 - 1, 2**40)])
def test_same_noise_as_on_a_cpu(seed, epoch, index):
    key = seed | epoch << 32
    out = torch.empty(4, 32, device=DEVICE)
    _draw[(1,)](out, key, index, 2, ROWS=4, BLOCKS=2)
    whole = Noise(key, torch.float32)
    expected = torch.from_numpy(whole.rectangle(index, 0, 4, 10)[:, :30])
    torch.testing.assert_close(out.cpu()[:, :30], expected, rtol=2**-20, atol=0)
    # The blocks that 11 values from the 16th on touch are one per row.
    _draw[(1,)](out, key, index, 1, ROWS=4, BLOCKS=2)
    torch.testing.assert_close(
        out.cpu()[:, 2:14], torch.from_numpy(whole.rectangle(index, 6, 4, 4)), rtol=2**-20, atol=0
    )


def test_quantiles_of_all_levels():
    gold, table = quantiles(torch.float64), quantiles(torch.float32)
    probability = torch.special.ndtr(gold)
    assert (probability * 65536 - torch.arange(65536) - 0.5).abs().max() < 1e-9
    assert torch.equal(table, gold.float())
    assert torch.equal(gold, -gold.flip(0))
    out = torch.empty(65536, device=DEVICE)
    _quantiles[(1,)](out, LEVELS=65536)
    ulp = torch.from_numpy(np.spacing(table.abs().numpy()))
    error = (out.cpu().double() - gold).abs() / ulp
    assert error.max() <= 5
    assert error.mean() <= 1
    assert gold.square().mean().sub(0.99998).abs() < 1e-5
    assert (gold**4).mean().sub(2.9991).abs() < 1e-4


def test_distribution():
    """Of a million values; five deviations each, and Kolmogorov-Smirnov at 1 %."""
    values = draws(333_333).flatten()
    count = len(values)
    assert values.mean().abs() < 5 / math.sqrt(count)
    assert (values.square().mean() - 1).abs() < 5 * math.sqrt(2 / count)
    assert (values**3).mean().abs() < 5 * math.sqrt(15 / count)
    assert ((values**4).mean() - 3).abs() < 5 * math.sqrt(96 / count)
    expected = torch.special.ndtr(values.sort().values)
    steps = torch.arange(count, dtype=torch.float64) / count
    distance = torch.maximum((expected - steps).max(), (steps + 1 / count - expected).max())
    assert distance < 1.63 / math.sqrt(count) + 2**-17


def test_values_are_independent_of_each_other():
    noise_of = Noise(3, torch.float64)
    values = torch.stack([torch.from_numpy(noise_of.rectangle(index, 0, 2000, 16)) for index in range(4)])
    count = 8000
    blocks = values.reshape(count, 48)  # 3 blocks of a row; rows and images after one another
    deviation = 1 / math.sqrt(count)
    assert (torch.cov(blocks.T) - torch.eye(48)).fill_diagonal_(0).abs().max() < 5 * deviation
    assert (blocks[1:] * blocks[:-1]).mean(0).abs().max() < 5 * deviation
    assert (values[0] * values[1]).mean().abs() < 5 / math.sqrt(values[0].numel())


def test_every_place_of_an_epoch_has_its_own():
    ways = [draws(5), draws(5, index=1), draws(5, seed=4), draws(5, epoch=1)]
    assert all((a != b).all() for i, a in enumerate(ways) for b in ways[:i])
    assert torch.equal(draws(5), ways[0])
