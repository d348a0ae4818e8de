"""Exact ranks: against sorting the fp64 distances, where fp32 gets them wrong, and at the edges of the protocol."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionreid.kernels import RankCounts, _exact_distances, rank_counts, rank_counts_of, ranking, reference


def made_up(num_query: int, num_gallery: int, width: int, kind: str, seed: int) -> tuple[Tensor, ...]:
    """Features of query and gallery: spread, on a coarse grid full of ties, or nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_query + num_gallery, width, generator=generator)
    if kind == "ties":
        rows = rows[torch.randint(0, 1 + len(rows) // 3, (len(rows),), generator=generator)].round()
    if kind == "near":
        rows = torch.randn(width, generator=generator) + 1e-6 * rows
    return rows[:num_query].clone(), rows[num_query:].clone()


def made_up_ids(num_query: int, num_gallery: int, persons: int, cameras: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed + 1)
    counts = (num_query, num_gallery, num_query, num_gallery)
    return tuple(
        torch.randint(0, top, (n,), generator=generator) for n, top in zip(counts, (persons,) * 2 + (cameras,) * 2)
    )


def assert_equal(counted: RankCounts, expected: RankCounts) -> None:
    assert counted.offsets.tolist() == expected.offsets.tolist()
    assert counted.ranks.tolist() == expected.ranks.tolist()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    num_query=st.integers(1, 7),
    num_gallery=st.integers(1, 30),
    width=st.sampled_from([1, 2, 5, 129]),
    kind=st.sampled_from(["spread", "ties", "near"]),
    persons=st.integers(1, 6),
    cameras=st.integers(1, 3),
    normalize=st.booleans(),
    few=st.sampled_from([0, 1 / 16, 1]),
    seed=st.integers(0, 9999),
)
def test_equals_sorting_fp64_distances(
    num_query: int, num_gallery: int, width: int, kind: str, persons: int, cameras: int, normalize: bool, few: float,
    seed: int,
) -> None:  # fmt: skip
    features = made_up(num_query, num_gallery, width, kind, seed)
    ids = made_up_ids(num_query, num_gallery, persons, cameras, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "QUERY_BLOCK", 3)
        patch.setattr(ranking, "GALLERY_BLOCK", 4)
        patch.setattr(_exact_distances, "EXACT_ROWS", 7)
        for name, value in {"ROWS": 2, "PAIRS": 5, "FEW": few, "BUCKETS": 16}.items():
            patch.setattr(ranking, name, value)
        counted = rank_counts(*features, *ids, normalize=normalize)
    assert_equal(counted, reference.rank_counts(*features, *ids, normalize=normalize))


def near_duplicates() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """Every gallery row within a few 1e-7 of one point: below fp32's rounding of the product, above fp64's."""
    features = made_up(20, 400, 600, "near", 3)
    return (features[0], features[1]), made_up_ids(20, 400, 10, 3, 3)


@pytest.mark.parametrize("normalize", [False, True])
def test_fp32_gets_these_ranks_wrong_and_ours_right(normalize: bool) -> None:
    (query, gallery), ids = near_duplicates()
    scaled = [torch.nn.functional.normalize(x) if normalize else x for x in (query, gallery)]
    product = scaled[1].square().sum(1) - 2 * scaled[0] @ scaled[1].T
    expected = reference.rank_counts(query, gallery, *ids, normalize=normalize)
    assert rank_counts_of(product, *ids).ranks.tolist() != expected.ranks.tolist()
    counted = rank_counts(query, gallery, *ids, normalize=normalize)
    assert_equal(counted, expected)
    assert counted.recomputed > 1000


def test_spread_features_are_almost_never_recomputed() -> None:
    query, gallery = torch.randn(50, 64), torch.randn(500, 64)
    ids = made_up_ids(50, 500, 20, 3, 0)
    counted = rank_counts(query, gallery, *ids)
    assert_equal(counted, reference.rank_counts(query, gallery, *ids))
    assert 0 < counted.recomputed < 0.01 * 50 * 500


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("width", [3, 128, 1000])
def test_the_error_bound_holds_and_is_not_vacuous(width: int, normalize: bool) -> None:
    query, gallery = (
        5 * torch.randn(40, width).abs(),
        3 * torch.randn(90, width).abs(),
    )  # no cancellation: the worst sums
    queries, items = (
        _exact_distances.Rows("query", query, normalize),
        _exact_distances.Rows("gallery", gallery, normalize),
    )
    ((_, fast),) = _exact_distances.fast_distances(_exact_distances.scaled(queries, slice(0, 40)), items, 90)
    q, g = torch.cartesian_prod(torch.arange(40), torch.arange(90)).unbind(1)
    exact = _exact_distances.exact_distances(queries, items, q, g).view(40, 90) - queries.length.square()[:, None]
    bound = _exact_distances.error_bound(queries, items, slice(0, 40))[:, None]
    assert ((fast - exact).abs() <= bound).all()
    assert (bound <= 1e-4 * items.length.max() * queries.length.max() + 1e-6 * items.length.max().square()).all()
    close = _exact_distances.close_distances(queries, items, q, g).view(40, 90) - queries.length.square()[:, None]
    close_bound = _exact_distances.close_bound(queries, items, torch.arange(40))[:, None]
    assert ((close - exact).abs() <= close_bound).all()
    assert (close_bound < bound / 5).all()


def test_products_are_those_of_float32_whatever_the_program_allows() -> None:
    """Named in torch's newer way, after which the older one raises."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    backends[0].fp32_precision = "tf32"
    try:
        with _exact_distances.full_precision(torch.empty(0)):
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == ["tf32", before[1]]
    finally:
        backends[0].fp32_precision = before[0]


def test_features_of_any_type_are_left_as_they_are() -> None:
    ids = made_up_ids(6, 40, 3, 3, 1)
    for dtype in (torch.float64, torch.float16):
        features = [x.to(dtype) for x in made_up(6, 40, 8, "near", 1)]
        kept = [x.clone() for x in features]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            counted = rank_counts(*features, *ids, normalize=True)
        assert_equal(counted, reference.rank_counts(*features, *ids, normalize=True))
        assert all(torch.equal(x, y) for x, y in zip(features, kept))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(num_gallery=st.integers(1, 30), levels=st.integers(1, 9), seed=st.integers(0, 999))
def test_given_distances_are_ranked_with_ties_by_index(num_gallery: int, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    distances = torch.randint(0, levels, (5, num_gallery), generator=generator).float()
    ids = made_up_ids(5, num_gallery, 4, 2, seed)
    assert_equal(rank_counts_of(distances, *ids), reference.rank_counts_of(distances, *ids))


@pytest.mark.parametrize(
    ("query", "gallery", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), "one model"),
        (torch.ones(2, 3), torch.ones(0, 3), r"gallery must be .* got \(0, 3\)"),
        (torch.ones(2, 3), torch.tensor([[1, 2, 3], [1, float("nan"), 3]]), r"gallery: 1 of 2 rows .* \[1\]"),
        (torch.full((2, 3), float("inf")), torch.ones(2, 3), "query: 2 of 2 rows"),
    ],
)
def test_wrong_features_are_named(query: Tensor, gallery: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_counts(query, gallery, *(torch.zeros(n, dtype=torch.long) for n in (2, len(gallery)) * 2))


def test_distances_must_be_finite() -> None:
    zero = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="finite"):
        rank_counts_of(torch.tensor([[float("nan")]]), zero, zero, zero, zero)


@pytest.mark.parametrize(
    ("place", "ids", "message"),
    [
        (0, torch.zeros(3, dtype=torch.long), r"query_persons must hold one integer for each of 2 rows, .* \(3,\)"),
        (1, torch.zeros(2, dtype=torch.long), r"gallery_persons .* of 4 rows, on cpu, got \(2,\)"),
        (2, torch.zeros(2, 1, dtype=torch.long), r"query_cameras .* got \(2, 1\)"),
        (3, torch.full((4,), float("nan")), "gallery_cameras .* torch.float32"),
        (3, torch.zeros(4, dtype=torch.long, device="meta"), "gallery_cameras .* on cpu, got .* on meta"),
    ],
)
def test_wrong_ids_are_named(place: int, ids: Tensor, message: str) -> None:
    given = [torch.zeros(n, dtype=torch.long) for n in (2, 4, 2, 4)]
    given[place] = ids
    with pytest.raises(ValueError, match=f"rank_counts: {message}"):
        rank_counts(torch.randn(2, 3), torch.randn(4, 3), *given)
    with pytest.raises(ValueError, match=f"rank_counts_of: {message}"):
        rank_counts_of(torch.rand(2, 4), *given)


def test_given_distances_must_be_floating_and_two_dimensional() -> None:
    zero = torch.zeros(1, dtype=torch.long)
    for distances in (torch.ones(1), torch.ones(1, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match="distances must be floating"):
            rank_counts_of(distances, zero, zero, zero, zero)
