"""Nearest neighbours: against sorting the fp64 distances, with ties, near-duplicates and every k."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionreid.kernels import _exact_distances as exact
from fusionreid.kernels import nearest_neighbours, neighbour_lists, neighbours, reference
from tests.kernels.test_ranking import made_up
from tests.numerics import assert_close


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    num_query=st.integers(1, 7),
    num_gallery=st.integers(1, 40),
    width=st.sampled_from([1, 3, 129]),
    kind=st.sampled_from(["spread", "ties", "near"]),
    normalize=st.booleans(),
    part=st.floats(0, 1),
    seed=st.integers(0, 9999),
)
def test_equals_sorting_fp64_distances(
    num_query: int, num_gallery: int, width: int, kind: str, normalize: bool, part: float, seed: int
) -> None:
    query, gallery = made_up(num_query, num_gallery, width, kind, seed)
    k = 1 + int(part * (num_gallery - 1))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BLOCK": 4, "AGAIN_ROWS": 2, "SPARE": 2}.items():
            patch.setattr(neighbours, name, value)
        found = nearest_neighbours(query, gallery, k, normalize=normalize)
    expected = reference.nearest_neighbours(query, gallery, k, normalize=normalize)
    assert found.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(found.distances, expected.distances, rtol=0, atol=0)
    largest = gallery.norm(dim=1).max().item() ** 2 + query.norm(dim=1).max().item() ** 2
    torch.testing.assert_close(
        found.farthest.double(), expected.farthest, rtol=0, atol=1e-6 * (2 if normalize else 2 * largest)
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(1, 40),
    width=st.sampled_from([1, 3, 129]),
    kind=st.sampled_from(["spread", "ties", "near"]),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    part=st.floats(0, 1),
    seed=st.integers(0, 9999),
)
def test_lists_of_some_rows_have_the_exact_order(
    num_rows: int, width: int, kind: str, ends: tuple[float, float], part: float, seed: int
) -> None:
    _, features = made_up(1, num_rows, width, kind, seed)
    k = 1 + int(part * (num_rows - 1))
    start = int(min(ends) * num_rows)
    rows = slice(start, max(int(max(ends) * num_rows), start))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BLOCK": 4, "AGAIN_ROWS": 2, "SPARE": 2}.items():
            patch.setattr(neighbours, name, value)
        found = neighbour_lists(features, k, rows=rows)
    expected = reference.nearest_neighbours(features, features, k)
    largest = 4e-6 * features.norm(dim=1).max().item() ** 2
    assert found.indices.tolist() == expected.indices[rows].tolist()
    torch.testing.assert_close(found.distances, expected.distances[rows], rtol=0, atol=largest)
    torch.testing.assert_close(found.farthest.double(), expected.farthest[rows], rtol=0, atol=largest)


def test_more_near_duplicates_than_spare_candidates() -> None:
    query, gallery = made_up(5, 300, 400, "near", 1)
    found, expected = (op(query, gallery, 10) for op in (nearest_neighbours, reference.nearest_neighbours))
    assert found.indices.tolist() == expected.indices.tolist()
    assert found.indices.tolist() != torch.cdist(query, gallery).topk(10, largest=False).indices.tolist()


def test_a_matrix_against_itself() -> None:
    rows = torch.randn(30, 16)
    found = nearest_neighbours(rows, rows, 3, normalize=True)
    assert found.indices[:, 0].tolist() == list(range(30))
    assert (found.distances[:, 0] == 0).all()
    assert_close("cosine", 1 - found.distances[:, 1] / 2, _best_cosine(rows), 1e-6)


def _best_cosine(rows: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(rows.double())
    return (unit @ unit.T).fill_diagonal_(-2).max(1).values


def test_no_row_is_nearer_than_itself() -> None:
    farthest = torch.cat([nearest_neighbours(row, row, 1).farthest for row in torch.randn(50, 1, 129)])
    assert (farthest >= 0).all()


@pytest.mark.parametrize("k", [0, 5, 1.5])
def test_k_must_fit_the_gallery(k: int) -> None:
    for op, query in ((nearest_neighbours, (torch.ones(2, 3),)), (neighbour_lists, ())):
        with pytest.raises(ValueError, match=f"{op.__name__}: k must be an integer from 1 to 4, .* got {k}"):
            op(*query, torch.ones(4, 3), k)


@pytest.mark.parametrize("rows", [slice(0, 5), slice(-2, 3), slice(3, 1), slice(0, 4, 2), slice(None, 2)])
def test_rows_must_be_consecutive_ones_of_the_features(rows: slice) -> None:
    with pytest.raises(ValueError, match="rows must be consecutive ones among 4, got slice"):
        neighbour_lists(torch.ones(4, 3), 1, rows=rows)


def test_widths_must_agree() -> None:
    with pytest.raises(ValueError, match="one model"):
        nearest_neighbours(torch.ones(2, 3), torch.ones(4, 2), 1)


@pytest.mark.parametrize("variable", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_a_onednn_that_may_round_to_bf16_is_not_asked(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """The bound holds for products in fp32; torch's own product finds the same neighbours."""
    query, gallery = torch.randn(5, 300), torch.randn(40, 300)
    expected = nearest_neighbours(query, gallery, 7)
    monkeypatch.setenv(variable, "BF16")
    exact._onednn_is_exact.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    try:
        found = nearest_neighbours(query, gallery, 7)
    finally:
        exact._onednn_is_exact.cache_clear()
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.distances, expected.distances)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_that_may_be_nearer_are_few_and_hold_all_that_are(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(neighbours, "IN_CACHE", 100)
    generator = torch.Generator().manual_seed(3)
    gallery = (torch.randn(1500, 64, generator=generator) * torch.logspace(-2, 2, 1500)[:, None]).to(dtype)
    query = torch.randn(4, 64, generator=generator)
    query[3] *= 1e-13  # longer by `normalize`, and yet no unit vector
    unit = F.normalize(gallery.double())
    distances = torch.cdist(F.normalize(query.double()), unit).square().T  # (G, Q)
    for rank in (0, 1, 10):
        limit = distances.sort(0).values[rank]
        nearer = (distances < limit).any(1).nonzero().flatten()
        found = neighbours.may_be_nearer(query, gallery, limit)
        assert set(nearer.tolist()) <= set(found.tolist())
        assert len(found) <= len(nearer) + 4
        assert (found.diff() > 0).all()


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1e25, 0.0, 1e-30])
def test_a_row_that_has_no_length_may_be_nearer(odd: float) -> None:
    gallery = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)))
    gallery[20] = odd
    query = gallery[:1]
    assert neighbours.may_be_nearer(query, gallery, torch.tensor([1e-3])).tolist() == [0, 20]
