"""The kernels of batch_hard_triplet: as accurate as plain torch, fp32-grade selection, tiles, corners, registration."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionreid.kernels import BatchHard, batch_hard_triplet, reference, triplet
from tests.kernels import test_triplet
from tests.kernels.test_triplet import assert_same
from tests.numerics import assert_as_accurate, assert_close


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    persons=st.lists(st.integers(0, 4), min_size=2, max_size=40),
    width=st.integers(1, 80),
    offset=st.sampled_from([0.0, 3.0, 90.0]),
    seed=st.integers(0, 99),
)
def test_selection_agrees_with_fp64_up_to_rounding(persons: list[int], width: int, offset: float, seed: int) -> None:
    x = offset + torch.randn(len(persons), width, generator=torch.Generator().manual_seed(seed))
    assert_selection_is_fp32_grade(x, torch.tensor(persons))


def assert_selection_is_fp32_grade(x: Tensor, persons: Tensor) -> None:
    """The chosen squares are the extreme ones, to within the rounding of |x|^2 + |y|^2 - 2 x y in fp32."""
    mined = batch_hard_triplet([x], persons)
    gold = (x.double()[:, None] - x.double()).square().sum(2)
    same = persons[:, None] == persons
    bound = 4 * (x.shape[1] + 8) * 2.0**-24 * x.double().square().sum(1).max()
    for chosen, extreme in (
        (mined.positive_indices[0], gold.masked_fill(~same, -1).amax(1)),
        (mined.negative_indices[0], gold.masked_fill(same, torch.inf).amin(1)),
    ):
        error = (gold.gather(1, chosen[:, None])[:, 0] - extreme).abs()
        assert (error[mined.valid] <= bound).all()


# Images and widths of the heads, one below, at and above the kernels' blocks; True: in the tiles of a large batch.
KERNEL_SHAPES = [
    *((1, (3,), False), (15, (7,), False), (16, (32, 31), False), (17, (255, 256, 257), False), (2, (3,), True)),
    *((127, (15,), True), (128, (16, 3), True), (257, (17,), True)),
]


def mined_and_gradients(
    op, features: list[Tensor], persons: Tensor, upstream: Tensor, **options
) -> tuple[BatchHard, list[Tensor]]:
    """What was mined, and the losses followed by their gradients."""
    features = [x.detach().requires_grad_() for x in features]
    mined = op(features, persons, **options)
    return mined, [mined.losses, *torch.autograd.grad((mined.losses * upstream).sum(), features)]


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("images", "widths", "large"), KERNEL_SHAPES)
def test_kernels_are_as_accurate_as_plain_torch(
    monkeypatch: pytest.MonkeyPatch, images: int, widths: tuple[int, ...], large: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(triplet, "SMALL", 0 if large else 1024)
    margin = 0.3 if images % 2 else None
    persons = torch.randint(0, max(2, images // 4), (images,))
    x, upstream = [(3 + torch.randn(images, w)).to(dtype) for w in widths], torch.randn(len(widths))
    mined, out = mined_and_gradients(batch_hard_triplet, x, persons, upstream, margin=margin)
    _, low = mined_and_gradients(reference.batch_hard_triplet, x, persons, upstream, margin=margin)
    doubles = [t.double() for t in x]
    exact, gold = mined_and_gradients(reference.batch_hard_triplet, doubles, persons, upstream, margin=margin)
    for name, *values in zip(("losses", *("gradient" for _ in x)), out, low, gold):
        assert_as_accurate(name, *values)
    assert_same(mined, exact)


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("normalize", [False, True])  # True makes copies: only False sees the strides
def test_kernels_take_heads_of_several_types_and_strides(normalize: bool) -> None:
    persons, upstream = torch.tensor([0, 1, 0, 2, 2, 2, 1, 3]), torch.randn(3)
    x = [torch.randn(8, 5), torch.randn(8, 2, 6)[:, 0].half(), torch.randn(7, 8).T]
    _, out = mined_and_gradients(batch_hard_triplet, x, persons, upstream, normalize=normalize)
    _, again = mined_and_gradients(batch_hard_triplet, x, persons, upstream, normalize=normalize)
    assert all(torch.equal(a, b) for a, b in zip(out, again))
    doubles = [t.double() for t in x]
    _, gold = mined_and_gradients(reference.batch_hard_triplet, doubles, persons, upstream, normalize=normalize)
    for value, expected, given_as in zip(out, gold, [out[0], *x]):
        assert value.dtype == given_as.dtype
        assert_close("loss and gradients", value, expected, 4 * torch.finfo(value.dtype).eps)


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("persons", [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 3], [7]])
def test_kernels_in_the_corners(persons: list[int]) -> None:
    test_triplet.test_equal_features_and_missing_partners_give_finite_losses_and_gradients(persons)
    for bad in range(len(persons)):
        x = torch.randn(len(persons), 3)
        x[bad] = torch.nan
        expected = reference.batch_hard_triplet([x], torch.tensor(persons)).losses
        assert batch_hard_triplet([x], torch.tensor(persons)).losses.isnan().equal(expected.isnan())


@pytest.mark.usefixtures("triton_path")
def test_kernels_select_as_fp64_does() -> None:
    for offset in (0.0, 90.0):
        assert_selection_is_fp32_grade(offset + torch.randn(37, 50), torch.randint(0, 6, (37,)))
    x = torch.randint(-1, 2, (37, 2)).float()  # many ties
    assert_same(
        batch_hard_triplet([x], torch.arange(37) // 5), reference.batch_hard_triplet([x], torch.arange(37) // 5)
    )


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("small", [0, 1024])
@pytest.mark.parametrize("kind", test_triplet.KINDS)
def test_features_far_from_zero_are_mined_exactly(small: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triplet, "SMALL", small)
    test_triplet.assert_exact(*test_triplet.far_from_zero(kind))


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("small", [0, 1024])
def test_squares_beyond_fp32_are_not_hidden(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triplet, "SMALL", small)
    test_triplet.test_squares_beyond_fp32_are_not_hidden()


@pytest.mark.usefixtures("triton_path")
def test_both_half_precisions_at_once() -> None:
    persons, upstream = torch.arange(12) // 4, torch.randn(3)
    x = [torch.randn(12, 5).half(), torch.randn(12, 7).bfloat16(), torch.randn(12, 3)]
    mined, out = mined_and_gradients(batch_hard_triplet, x, persons, upstream)
    exact, gold = mined_and_gradients(reference.batch_hard_triplet, [t.double() for t in x], persons, upstream)
    assert_same(mined, exact)
    for value, expected, given_as in zip(out, gold, [out[0], *x]):
        assert value.dtype == given_as.dtype
        assert_close("loss and gradients", value, expected, 4 * torch.finfo(value.dtype).eps)


@pytest.mark.usefixtures("triton_path")
def test_kernels_are_registered_whole() -> None:
    x = [torch.randn(5, 3, requires_grad=True), torch.randn(5, 2, 4)[:, 1].requires_grad_()]
    persons = torch.tensor([0, 0, 1, 1, 1])
    torch.library.opcheck(triplet._forward, ([t.detach() for t in x], persons, None))
    detached = [t.detach() for t in x]
    _, shares, pairs, indices, _ = triplet._forward(detached, persons, 0.3)
    torch.library.opcheck(triplet._backward, (torch.randn(2), detached, shares, pairs, indices))
    compiled = torch.compile(lambda *t: batch_hard_triplet(t, persons).losses, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*x), batch_hard_triplet(x, persons).losses)


@triton.jit
def place_tiles(rows_ptr, columns_ptr, start, blocks, SIZE: tl.constexpr):
    tile = start + tl.arange(0, SIZE)
    row, column = triplet._place(tl.minimum(tile, blocks * (blocks + 1) // 2 - 1), blocks)
    tl.store(rows_ptr + tile - start, row)
    tl.store(columns_ptr + tile - start, column)


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 9, 16, 31, 512, 8192])
def test_every_tile_of_the_upper_triangle_has_one_place(blocks: int) -> None:
    count, group = blocks * (blocks + 1) // 2, triplet.GROUP.value
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
