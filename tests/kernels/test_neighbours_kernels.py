"""Neighbours on a GPU: equal to sorting the fp64 distances, also where rows find more than they have places for."""

import pytest
import torch
from torch import Tensor

from fusionreid.kernels import (
    _exact_distances,
    nearest_neighbours,
    neighbour_lists,
    neighbours,
    rank_counts,
    reference,
)
from fusionreid.kernels import _int8_products as int8
from tests.kernels.test_ranking import assert_equal, made_up, made_up_ids
from tests.kernels.test_ranking_kernels import on_device

pytestmark = pytest.mark.usefixtures("triton_path")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, spans and pieces; and the plain path cannot help out."""
    monkeypatch.setattr(neighbours, "QUERIES", 100)
    monkeypatch.setattr(int8, "SPAN", 384)
    monkeypatch.setattr(neighbours, "CAPACITY", 128)
    monkeypatch.delattr(neighbours, "_nearest_by_blocks")


def check(query: Tensor, gallery: Tensor, k: int, *, normalize: bool = False) -> None:
    expected = reference.nearest_neighbours(query, gallery, k, normalize=normalize)
    found = nearest_neighbours(*on_device(query, gallery), k, normalize=normalize)
    assert found.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(found.distances.cpu(), expected.distances, rtol=1e-14, atol=1e-14)
    largest = 4e-6 * max(x.norm(dim=1).max().item() for x in (query, gallery)) ** 2
    torch.testing.assert_close(found.farthest.double().cpu(), expected.farthest, rtol=0, atol=largest)


@pytest.mark.parametrize(
    ("num_query", "num_gallery", "width", "k", "kind"),
    [
        (1, 1, 1, 1, "spread"),
        (3, 40, 5, 40, "ties"),
        (129, 600, 63, 3, "spread"),
        (7, 257, 130, 20, "near"),
        (5, 385, 64, 128, "ties"),
    ],
)
def test_equals_sorting_fp64_distances(num_query: int, num_gallery: int, width: int, k: int, kind: str) -> None:
    check(*made_up(num_query, num_gallery, width, kind, seed=width), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalized_features_of_any_type(dtype: torch.dtype) -> None:
    query, gallery = (x.to(dtype) for x in made_up(20, 300, 70, "spread", 5))
    gallery[150:] = gallery[:150]  # ties by index
    check(query, gallery, 12, normalize=True)


@pytest.mark.parametrize("farthest_first", [True, False])
def test_any_order_of_the_gallery(farthest_first: bool) -> None:
    """One that comes ever nearer has more below a row's limit than there are places, again and again."""
    query, gallery = torch.zeros(2, 8), torch.randn(1000, 8)
    check(query, gallery[gallery.norm(dim=1).argsort(descending=farthest_first)], 5)


@pytest.mark.parametrize("first", [0, 398])
def test_the_bound_is_that_of_all_spans(first: int) -> None:
    """In one span the fast product is off by more than two rows differ; the other one alone has no error."""
    query, gallery = torch.full((1, 700), 100 / 254), torch.zeros(400, 700)
    query[0, :2] = 127
    gallery[first : first + 2, 1] = 127
    gallery[first, 0] = 0.4 / 254  # nearer by 0.4
    gallery[first + 1, 2:] = 100 / 254**2  # by 0.9, which the product leaves out
    check(query, gallery, 2)


def test_lists_of_some_rows() -> None:
    _, features = made_up(1, 300, 20, "spread", 2)
    found = neighbour_lists(*on_device(features), 9, rows=slice(90, 250))
    expected = reference.nearest_neighbours(features, features, 9)
    assert found.indices.tolist() == expected.indices[90:250].tolist()
    assert neighbour_lists(*on_device(features), 9, rows=slice(7, 7)).indices.shape == (0, 9)


@pytest.fixture
def gallery_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gallery is treated as one that lies on another device; without a GPU, bringing it is a copy."""
    both = _exact_distances.Rows.both.__func__  # type: ignore[attr-defined]

    def apart(
        cls: type, query: Tensor, gallery: Tensor, normalize: bool
    ) -> tuple[_exact_distances.Rows, _exact_distances.Rows]:
        queries, items = both(cls, query, gallery, normalize)
        items.features, items.elsewhere = items.features.cpu(), True
        return queries, items

    monkeypatch.setattr(_exact_distances.Rows, "both", classmethod(apart))
    monkeypatch.setattr("fusionreid.kernels._exact_distances.FETCHED", 50)
    monkeypatch.setattr("fusionreid.kernels._int8_products.SPAN", 128)


@pytest.mark.parametrize("kind", ["spread", "near"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_gallery_elsewhere_is_brought_span_by_span(gallery_elsewhere: None, kind: str, normalize: bool) -> None:
    query, gallery = made_up(12, 500, 30, kind, 1)
    ids = made_up_ids(12, 500, 9, 3, 1)
    counted = rank_counts(*on_device(query, gallery, *ids), normalize=normalize)
    assert_equal(counted, reference.rank_counts(query, gallery, *ids, normalize=normalize))
    check(query, gallery, 7, normalize=normalize)
    wide = [x.double() for x in (query, gallery)]  # takes the plain path
    assert_equal(rank_counts(*on_device(*wide, *ids)), reference.rank_counts(*wide, *ids))


def test_a_gallery_on_another_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="a gallery on meta and queries on cpu"):
        nearest_neighbours(torch.ones(2, 3, device="cpu"), torch.ones(4, 3, device="meta"), 1)
