"""The tiles of batch_hard_triplet: their order, both sizes alike, crowds around an image, broken and invalid ones."""

import pytest
import torch
import triton
import triton.language as tl

from fusionreid.kernels import batch_hard_triplet, triplet, triplet_tiles
from tests.kernels.test_triplet_kernels import mined_and_gradients
from tests.numerics import assert_close


@triton.jit
def place_tiles(rows_ptr, columns_ptr, start, blocks, SIZE: tl.constexpr):
    tile = start + tl.arange(0, SIZE)
    row, column = triplet_tiles.place(tl.minimum(tile, blocks * (blocks + 1) // 2 - 1), blocks)
    tl.store(rows_ptr + tile - start, row)
    tl.store(columns_ptr + tile - start, column)


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 9, 16, 31, 512, 8192])
def test_every_tile_of_the_upper_triangle_has_one_place(blocks: int) -> None:
    count, group = blocks * (blocks + 1) // 2, triplet_tiles.GROUP.value
    size = min(triton.next_power_of_2(count), 2**18)
    start = max(0, count - size)
    row, column = torch.zeros(2, size, dtype=torch.int32)
    place_tiles[(1,)](row, column, start, blocks, SIZE=size)
    row, column = row[: count - start].long(), column[: count - start].long()
    assert ((row >= 0) & (row <= column) & (column < blocks)).all()
    first = column // group * group
    across, down = column - first, row - first
    above = row * (blocks - first).clamp_max(group) + across
    corner = first * (blocks - first).clamp_max(group) + across * (across + 1) // 2 + down
    number = first * (first + 1) // 2 + torch.where(down < 0, above, corner)
    assert torch.equal(number, torch.arange(start, count))


@pytest.mark.usefixtures("triton_path")
def test_a_small_and_a_large_batch_are_computed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them an image that all of its person and, nearest to the rest, many others choose."""
    x, persons, upstream = torch.randn(2, 48, 20), torch.arange(48) // 16, torch.randn(2)
    x[:, 5] *= 9
    x[:, 20] = x.mean(1)
    _, small = mined_and_gradients(batch_hard_triplet, list(x), persons, upstream)
    monkeypatch.setattr(triplet, "SMALL", 0)
    mined, large = mined_and_gradients(batch_hard_triplet, list(x), persons, upstream)
    assert (mined.positive_indices == 5).sum() >= 30
    assert (mined.negative_indices == 20).sum() >= 30
    for name, a, b in zip(("losses", "gradient", "gradient"), small, large):
        assert_close(name, a, b, 4 * torch.finfo(torch.float32).eps)


@pytest.mark.usefixtures("triton_path")
def test_what_is_not_valid_does_not_pull_even_when_its_partner_is_nan() -> None:
    """Persons of one image each, whose nearest other one is broken."""
    x = torch.randn(4, 3)
    x[0] = torch.nan
    persons = torch.tensor([1, 2, 3, 4])
    mined, (losses, gradient) = mined_and_gradients(batch_hard_triplet, [x], persons, torch.ones(1))
    assert losses.item() == 0
    assert (gradient == 0).all()
    assert mined.positive_indices.tolist() == [[0, 1, 2, 3]]


@pytest.mark.usefixtures("triton_path")
def test_a_broken_image_that_is_not_valid_itself_is_everyones_nearest() -> None:
    x = torch.randn(5, 3)
    x[4] = torch.nan
    mined = batch_hard_triplet([x], torch.tensor([0, 0, 1, 1, 2]))
    assert mined.negative_indices[0, :4].tolist() == [4] * 4
    assert mined.losses.isnan().all()


@pytest.mark.usefixtures("triton_path")
def test_equal_images_tie_with_the_anchor_itself_and_nearly_equal_ones_do_not_pull() -> None:
    x, persons = torch.ones(4, 3), torch.tensor([0, 0, 1, 1])
    x[1::2, 0] += 2.0**-22  # |x - y|^2 is 6e-14, less than the least that is told from 0
    mined, (_, gradient) = mined_and_gradients(batch_hard_triplet, [x], persons, torch.ones(1))
    assert (mined.positive_distances == 1e-6).all()
    assert (gradient == 0).all()
    equal = batch_hard_triplet([torch.ones(4, 3)], persons)
    assert equal.positive_indices.tolist() == [[0, 0, 2, 2]]
    assert equal.negative_indices.tolist() == [[2, 2, 0, 0]]


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("small", [0, 1024])
def test_squares_that_cancel_below_zero_still_count(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triplet, "SMALL", small)
    mined = batch_hard_triplet([90 + 1e-4 * torch.randn(48, 20)], torch.arange(48) // 2)
    assert mined.valid.all()
