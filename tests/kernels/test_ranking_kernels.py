"""Ranks by tiles: equal to sorting the fp64 distances, whatever the sizes, and where fp32 gets them wrong."""

import pytest
import torch
from torch import Tensor

from fusionreid.kernels import _exact_distances, rank_counts, ranking, reference
from fusionreid.kernels import _int8_products as int8
from tests.kernels.test_ranking import assert_equal, made_up, made_up_ids

pytestmark = pytest.mark.usefixtures("triton_path")


def device() -> torch.device:
    return torch.empty(0).device


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [x.to(device()) for x in tensors]


@pytest.fixture(autouse=True)
def _tiles_only(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The plain path cannot help out, except where a test is about that."""
    if "plain_path" not in request.fixturenames:
        monkeypatch.delattr(ranking, "_count_features")


@pytest.fixture
def plain_path() -> None:
    pass


@pytest.mark.parametrize(
    ("num_query", "num_gallery", "width", "persons", "kind"),
    [
        (1, 1, 1, 1, "spread"),
        (3, 40, 5, 4, "ties"),
        (3, 127, 64, 4, "near"),
        (128, 128, 63, 90, "spread"),
        (129, 201, 130, 90, "ties"),
        (7, 257, 1100, 5, "spread"),
    ],
)
def test_equals_sorting_fp64_distances(
    num_query: int, num_gallery: int, width: int, persons: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "QUERIES", 100)
    monkeypatch.setattr(int8, "SPAN", 200)
    features = made_up(num_query, num_gallery, width, kind, seed=width)
    ids = made_up_ids(num_query, num_gallery, persons, 3, seed=width)
    expected = reference.rank_counts(*features, *ids)
    assert_equal(rank_counts(*on_device(*features, *ids)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalized_features_of_any_type(dtype: torch.dtype) -> None:
    features = [x.to(dtype) for x in made_up(20, 150, 70, "spread", 5)]
    features[1][40:80] = features[1][:40]  # equal rows: ties by index
    ids = made_up_ids(20, 150, 10, 3, 5)
    expected = reference.rank_counts(*features, *ids, normalize=True)
    assert_equal(rank_counts(*on_device(*features, *ids), normalize=True), expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_near_duplicates_are_told_apart_in_double_precision(normalize: bool) -> None:
    features, ids = made_up(10, 150, 200, "near", 3), made_up_ids(10, 150, 10, 3, 3)
    counted = rank_counts(*on_device(*features, *ids), normalize=normalize)
    assert_equal(counted, reference.rank_counts(*features, *ids, normalize=normalize))
    assert counted.recomputed > 1000  # nearly all


def test_only_junk_and_no_match_leave_nothing_to_count() -> None:
    features, persons = made_up(4, 30, 8, "spread", 0), torch.tensor([1, 1, 7, 9])
    ids = persons, torch.arange(30) % 3, torch.tensor([0, 5, 0, 0]), torch.zeros(30, dtype=torch.long)
    counted = rank_counts(*on_device(*features, *ids))
    assert counted.offsets.tolist() == [0, 0, 10, 10, 10]  # of the first query all are junk
    assert_equal(counted, reference.rank_counts(*features, *ids))
    nobody = rank_counts(*on_device(*features, persons + 100, *ids[1:]))
    assert nobody.ranks.tolist() == []
    assert nobody.offsets.tolist() == [0] * 5


@pytest.mark.parametrize("missing", [0, 1])
def test_more_open_pairs_than_can_be_noted_take_the_plain_path(
    missing: int, plain_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, persons = made_up(10, 60, 20, "near", 4), (torch.arange(10), torch.arange(60))
    ids = *persons, torch.zeros(10, dtype=torch.long), torch.ones(60, dtype=torch.long)  # one match each
    taken, plain = [], ranking._count_features
    monkeypatch.setattr(ranking, "_count_features", lambda *given: taken.append(len(given[2])) or plain(*given))
    needed = rank_counts(*on_device(*features, *ids)).recomputed
    assert not taken
    monkeypatch.setattr(ranking, "CAPACITY", needed - missing)
    assert_equal(rank_counts(*on_device(*features, *ids)), reference.rank_counts(*features, *ids))
    assert taken == [10] * missing


def test_twice_the_same_and_spread_features_are_almost_never_recomputed() -> None:
    features, ids = made_up(50, 300, 64, "spread", 8), made_up_ids(50, 300, 20, 3, 8)
    first, second = (rank_counts(*on_device(*features, *ids)) for _ in range(2))
    assert_equal(first, second)
    assert 0 <= first.recomputed == second.recomputed < 50


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["normal", "positive", "one large"])
@pytest.mark.parametrize("width", [3, 200, 700])
def test_the_error_bound_holds_and_is_not_vacuous(width: int, kind: str, normalize: bool) -> None:
    query, gallery = 5 * torch.randn(10, width), 3 * torch.randn(30, width)
    if kind == "positive":  # no cancellation
        query, gallery = query.abs(), gallery.abs()
    if kind == "one large":  # coarse steps
        query[:, 0], gallery[:, 0] = 500, 300
    queries, items = (
        _exact_distances.Rows("query", query, normalize),
        _exact_distances.Rows("gallery", gallery, normalize),
    )
    mine, theirs = (int8.split_rows(rows, torch.arange(len(rows))) for rows in (queries, items))
    fast = items.length.square().float() - 2 * kept_product(mine, theirs)[:10, :30]
    q, g = torch.cartesian_prod(torch.arange(10), torch.arange(30)).unbind(1)
    exact = _exact_distances.exact_distances(queries, items, q, g).view(10, 30) - queries.length.square()[:, None]
    bound = int8.error_bound(mine, theirs, queries.length, items.length.max(), width)
    assert ((fast - exact).abs() <= bound[:, None]).all()
    if kind != "one large" and width > 3:
        assert (bound < _exact_distances.error_bound(queries, items, slice(0, 10)) / 2).all()


@pytest.mark.parametrize("parts", [(1, 2), (2, 1), (3, 0), (0, 3)])
def test_the_error_bound_holds_where_what_is_left_out_is_largest(parts: tuple[int, int]) -> None:
    """Aligned parts of two rows whose product is not taken: x1 with y2, and the rest, here part 3, with all of y."""
    query, gallery = (torch.full((1, 2000), (127.0, 100 / 254, 100 / 254**2, 0.45 / 254**2)[part]) for part in parts)
    query[0, :2], gallery[0, :2] = torch.tensor([127.0, 0]), torch.tensor([0, 127.0])  # steps of 1
    query *= 64  # else the rounding of |y|^2 may be larger
    queries, items = _exact_distances.Rows("query", query, False), _exact_distances.Rows("gallery", gallery, False)
    mine, theirs = (int8.split_rows(rows, torch.zeros(1, dtype=torch.long)) for rows in (queries, items))
    fast = -2 * kept_product(mine, theirs)[0, 0].double()
    error = (fast + 2 * (query.double() * gallery.double()).sum()).abs()
    bound = int8.error_bound(mine, theirs, queries.length, items.length[0], 2000)[0]
    assert bound / 2 < error <= bound


def kept_product(query: int8.Split, gallery: int8.Split) -> Tensor:
    """Of all rows, as the kernel sums it."""
    x, y = (rows.parts.unflatten(1, (-1, 3, int8.BLOCK_D)).double().unbind(2) for rows in (query, gallery))
    x, y = ([part.flatten(1) for part in parts] for parts in (x, y))
    high, middle, low = (sum(x[i] @ y[n - i].T for i in range(n + 1)).float() for n in range(3))
    return (high + (middle + low / 254) / 254) * query.steps[:, None] * gallery.steps
