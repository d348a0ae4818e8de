"""Batch-hard triplet: the recorded losses and gradients, brute-force loops, and the corners of the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionreid.kernels import BatchHard, _triplet_torch, batch_hard_triplet, reference
from tests.numerics import assert_close, load_case

_, RECORDED = load_case("modules/losses")


@pytest.mark.parametrize("twin", ["", "_dup"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("margin", [None, 0.3])
def test_matches_recorded_losses_and_gradients(margin: float | None, normalize: bool, twin: str) -> None:
    name = f"triplet_{margin or 'soft'}{'_normalised' if normalize else ''}{twin}"
    persons = torch.from_numpy(RECORDED["in/labels"])
    for dtype, tag, relative in ((torch.float64, "f64", 1e-9), (torch.float32, "f32", 1e-6)):
        x = torch.from_numpy(RECORDED["in/feat" + twin]).to(dtype).requires_grad_()
        mined = batch_hard_triplet([x], persons, margin=margin, normalize=normalize)
        mined.losses.sum().backward()
        assert_close(name, mined.losses[0].detach(), RECORDED[f"{tag}/{name}"], relative)
        assert_close(f"{name} gradient", x.grad, RECORDED[f"{tag}/{name}_grad"], relative)
        if not normalize:
            assert_close("positive", mined.positive_distances[0], RECORDED[f"{tag}/dist_ap{twin}"], relative)
            assert_close("negative", mined.negative_distances[0], RECORDED[f"{tag}/dist_an{twin}"], relative)
            assert mined.positive_indices[0].tolist() == RECORDED[f"{tag}/p_inds{twin}"].tolist()
            assert mined.negative_indices[0].tolist() == RECORDED[f"{tag}/n_inds{twin}"].tolist()


def brute_force(x: Tensor, persons: list[int], margin: float | None) -> tuple[float, list[tuple[int, int] | None]]:
    pairs: list[tuple[int, int] | None] = []
    losses = []
    rows = x.double().tolist()
    for a, person in enumerate(persons):
        squares = [max(sum((u - v) ** 2 for u, v in zip(rows[a], row)), 1e-12) for row in rows]
        same = [i for i, p in enumerate(persons) if p == person]
        other = [i for i, p in enumerate(persons) if p != person]
        if len(same) == 1 or not other:
            pairs.append(None)
            continue
        p, n = max(same, key=lambda i: (squares[i], -i)), min(other, key=lambda i: (squares[i], i))
        gap = math.sqrt(squares[p]) - math.sqrt(squares[n])
        losses.append(math.log1p(math.exp(gap)) if margin is None else max(0, gap + margin))
        pairs.append((p, n))
    return sum(losses) / max(1, len(losses)), pairs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    persons=st.lists(st.integers(0, 4), min_size=1, max_size=17),
    width=st.integers(1, 3),
    margin=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 99),
)
def test_matches_brute_force_with_ties_and_any_counts(
    persons: list[int], width: int, margin: float | None, seed: int
) -> None:
    x = torch.randint(-2, 3, (len(persons), width), generator=torch.Generator().manual_seed(seed)).float()
    expected, pairs = brute_force(x, persons, margin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triplet_torch, "BLOCK_ELEMENTS", 3 * len(persons))  # three anchors at a time
        patch.setattr(_triplet_torch, "PAIR_ELEMENTS", 2 * width)  # two
        mined = batch_hard_triplet([x], torch.tensor(persons), margin=margin)
    assert_same(mined, reference.batch_hard_triplet([x], torch.tensor(persons), margin=margin))
    assert mined.losses.item() == pytest.approx(expected, rel=1e-5)
    assert mined.valid.tolist() == [pair is not None for pair in pairs]
    found = zip(mined.positive_indices[0].tolist(), mined.negative_indices[0].tolist())
    assert [pair for pair, valid in zip(found, mined.valid) if valid] == [pair for pair in pairs if pair]


def assert_same(mined: BatchHard, expected: BatchHard) -> None:
    torch.testing.assert_close(mined.losses, expected.losses.to(mined.losses.dtype))
    assert torch.equal(mined.valid, expected.valid)
    for name in ("positive_indices", "negative_indices"):
        assert torch.equal(getattr(mined, name)[:, mined.valid], getattr(expected, name)[:, mined.valid])


@pytest.mark.parametrize("margin", [None, 0.3])
def test_sparse_gradient_equals_the_dense_one_in_every_head(
    margin: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_triplet_torch, "PAIR_ELEMENTS", 15)  # three anchors at a time, or fewer
    persons = torch.tensor([0, 1, 0, 2, 2, 2, 1, 3])
    widths = (5, 3, 9)
    ours = [torch.randn(8, w, dtype=torch.float64, requires_grad=True) for w in widths]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    upstream = torch.randn(3, dtype=torch.float64)
    (batch_hard_triplet(ours, persons, margin=margin).losses * upstream).sum().backward()
    (reference.batch_hard_triplet(theirs, persons, margin=margin).losses * upstream).sum().backward()
    for a, b in zip(ours, theirs):
        assert_close("gradient", a.grad, b.grad, 1e-12)


def test_gradcheck_of_the_reference() -> None:
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    persons = torch.tensor([0, 0, 1, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda t: reference.batch_hard_triplet([t], persons).losses, x)


@pytest.mark.parametrize("persons", [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 3], [7]])
def test_equal_features_and_missing_partners_give_finite_losses_and_gradients(persons: list[int]) -> None:
    x = torch.ones(len(persons), 3, requires_grad=True)
    mined = batch_hard_triplet([x], torch.tensor(persons))
    mined.losses.sum().backward()
    two_persons = persons == [0, 0, 1, 1]
    assert mined.losses.item() == pytest.approx(math.log(2) if two_persons else 0)
    assert int(mined.valid.sum()) == (4 if two_persons else 0)
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_far_apart_features_do_not_overflow_and_nan_is_not_hidden() -> None:
    x = torch.tensor([[0.0], [1e4], [1e4], [0.0]])
    assert batch_hard_triplet([x], torch.tensor([0, 0, 1, 1])).losses.item() == pytest.approx(1e4)
    assert batch_hard_triplet([x * float("nan")], torch.tensor([0, 0, 1, 1])).losses.isnan().all()


def far_from_zero(kind: str) -> tuple[Tensor, Tensor]:
    """Features that lie close together, but far from 0: 8 persons, 4 images each."""
    x, persons = torch.randn(32, 64), torch.arange(32) // 4
    if kind == "alike":
        x += 1e4
    if kind == "unlike":
        x += 1e4 * torch.randn(64)
    if kind == "one outlier":
        x[0] += 300
    if kind == "half":
        x = (x + 700).half()  # in steps of 1/2: many ties
    return x, persons


KINDS = ["alike", "unlike", "one outlier", "half"]


def assert_exact(x: Tensor, persons: Tensor) -> None:
    """The pairs are the hardest ones by fp64 distances, and losses and gradients follow from them."""
    x, gold = x.clone().requires_grad_(), x.double().requires_grad_()
    mined, expected = batch_hard_triplet([x], persons), reference.batch_hard_triplet([gold], persons)
    squares = (gold[:, None] - gold).square().sum(2).detach()
    for chosen, extreme in (
        (mined.positive_indices[0], expected.positive_indices[0]),
        (mined.negative_indices[0], expected.negative_indices[0]),
    ):
        found, best = (squares.gather(1, index[:, None]) for index in (chosen, extreme))
        assert ((found - best).abs() <= 1e-5 * best).all()
    assert_close("loss", mined.losses, expected.losses, 1e-5)
    (ours,), (theirs,) = torch.autograd.grad(mined.losses, x), torch.autograd.grad(expected.losses, gold)
    rounding = 2.0**-23 * expected.positive_distances.max().item()  # of a gap, and so of its slope
    assert_close("gradient", ours, theirs, 2 * torch.finfo(x.dtype).eps + 1e-5 + rounding)


@pytest.mark.parametrize("kind", KINDS)
def test_features_far_from_zero_are_mined_exactly(kind: str) -> None:
    assert_exact(*far_from_zero(kind))


def test_squares_beyond_fp32_are_not_hidden() -> None:
    x = torch.tensor([[0.0], [1e19], [3e19], [0.0]], requires_grad=True)
    losses = batch_hard_triplet([x], torch.tensor([0, 0, 1, 1])).losses
    assert not losses.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_computed_in_fp32_under_autocast_too(dtype: torch.dtype) -> None:
    x, persons = (30 * torch.randn(16, 64)).to(dtype), torch.arange(16) // 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mined = batch_hard_triplet([x], persons)
    assert mined.losses.dtype == torch.float32
    assert_close("loss", mined.losses, batch_hard_triplet([x.double()], persons).losses, 1e-6)


@pytest.mark.parametrize("differentiated", [False, True])
def test_compiles_without_a_graph_break(differentiated: bool) -> None:
    x, persons = torch.randn(12, 7, requires_grad=differentiated), torch.arange(12) // 3

    def losses(t: Tensor) -> Tensor:
        return batch_hard_triplet([t, 2 * t], persons).losses

    results = [torch.compile(losses, backend="aot_eager", fullgraph=True)(x), losses(x)]
    torch.testing.assert_close(*results)
    if differentiated:
        torch.testing.assert_close(*(torch.autograd.grad(value.sum(), x) for value in results))


def test_heads_of_one_width_are_as_if_alone_whatever_their_types() -> None:
    persons, upstream = torch.arange(20) // 4, torch.randn(6)
    types = torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16, torch.float32
    x = [(3 + torch.randn(20, w)).to(t).requires_grad_() for w, t in zip((7, 7, 5, 5, 5, 7), types)]
    together = batch_hard_triplet(x, persons)
    gradients = torch.autograd.grad((together.losses * upstream).sum(), x)
    for head, (value, gradient) in enumerate(zip(x, gradients)):
        alone = batch_hard_triplet([value], persons)
        (expected,) = torch.autograd.grad(alone.losses * upstream[head], value)
        assert gradient.dtype == value.dtype
        torch.testing.assert_close(gradient, expected, rtol=4 * torch.finfo(value.dtype).eps, atol=1e-7)
        assert_close("loss", together.losses[head], alone.losses[0], 1e-6)
        assert torch.equal(together.positive_indices[head], alone.positive_indices[0])


@pytest.mark.parametrize(
    ("features", "persons", "options", "message"),
    [
        ([torch.ones(4, 2)], torch.zeros(3, dtype=torch.long), {}, r"N = 3 persons, got \(4, 2\)"),
        ([], torch.zeros(3, dtype=torch.long), {}, "got 0 heads"),
        ([torch.ones(2, 3)], torch.tensor(1), {}, r"persons \(\) torch.int64"),
        ([torch.ones(2, 0)], torch.zeros(2, dtype=torch.long), {}, "D > 0, with"),
        ([torch.ones(2, 3).int()], torch.zeros(2, dtype=torch.long), {}, "floating .* in head 0"),
        ([torch.ones(2, 3)], torch.tensor([0, torch.nan]), {}, r"integer persons .* torch.float32"),
        (
            [torch.ones(2, 3), torch.ones(2, 3, device="meta")],
            torch.zeros(2, dtype=torch.long),
            {},
            "head 1 is on meta",
        ),
        ([torch.ones(2, 3)], torch.zeros(2, dtype=torch.long), {"margin": math.nan}, "margin must be finite"),
        ([torch.ones(2, 3)], torch.zeros(2, dtype=torch.long), {"product_dtype": torch.int32}, "product_dtype must be"),
    ],
)
def test_wrong_input_is_named(features: list[Tensor], persons: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_hard_triplet(features, persons, **options)


def test_products_in_half_precision_follow_the_published_formula() -> None:
    x = 30 * torch.randn(16, 64)
    persons = torch.arange(16) // 4
    out = batch_hard_triplet([x], persons, product_dtype=torch.bfloat16)
    squares, low = x.square().sum(1), x.bfloat16()
    noisy = (squares[:, None] + squares - 2 * (low @ low.T).float()).clamp_min(1e-12).sqrt()
    same = persons[:, None] == persons
    torch.testing.assert_close(out.positive_distances[0], noisy.masked_fill(~same, -1).amax(1), rtol=2e-2, atol=0)
    torch.testing.assert_close(out.negative_distances[0], noisy.masked_fill(same, torch.inf).amin(1), rtol=2e-2, atol=0)
    assert not torch.equal(out.negative_distances, batch_hard_triplet([x], persons).negative_distances)
