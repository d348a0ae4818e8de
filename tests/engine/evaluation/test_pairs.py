"""Pairs counted in bins equal pairs counted one by one, on any number of processes."""

import math

import pytest
import torch
from torch import Tensor

from fusionreid.engine.distributed import parallel
from fusionreid.engine.evaluation.details import nearest_images, nearest_match
from fusionreid.engine.evaluation.measures import Ids, distance_blocks
from fusionreid.engine.evaluation.pairs import BARS, BINS, count_pairs, describe_pairs, distance_range, roc_curve


def made(unit: bool = True) -> tuple[Tensor, Tensor, Ids]:
    generator = torch.Generator().manual_seed(4)
    persons = torch.randn(12, 16, generator=generator)
    ids = [torch.randint(high, (count,), generator=generator) for high in (12, 3) for count in (40, 200)]
    query, gallery = (persons[p] + torch.randn(len(p), 16, generator=generator) for p in ids[:2])
    if unit:
        query, gallery = (torch.nn.functional.normalize(rows) for rows in (query, gallery))
    return query, gallery, (ids[0], ids[1], ids[2], ids[3])


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("shares", [1, 3, 50])  # of 50 some have no query
def test_counts_equal_a_walk_over_all_pairs(unit: bool, shares: int) -> None:
    query, gallery, ids = made(unit)
    of_person, of_camera = ids[0][:, None] == ids[1], ids[2][:, None] == ids[3]
    rows = torch.arange(40).tensor_split(shares)
    parts = [(list(distance_blocks(query[r], gallery)), (ids[0][r], ids[1], ids[2][r], ids[3])) for r in rows]
    distances = torch.cat([block for blocks, _ in parts for block in blocks])
    ends = torch.tensor([distance_range(blocks, own) for blocks, own in parts])
    low, high = ends[:, 0].min().item(), ends[:, 1].max().item()
    counted = distances[~(of_person & of_camera)]
    assert (low, high) == (counted.min(), counted.max())
    of_parts = [count_pairs(blocks, own, low, high) for blocks, own in parts]
    same, other = (sum(getattr(part, kind) for part in of_parts) for kind in ("same", "other"))
    width = (high - low) / BINS
    for counts, mask in ((same, of_person & ~of_camera), (other, ~of_person)):
        assert counts.sum() == mask.sum()
        for last in (0, 17, BINS // 3, BINS - 1):
            limit = low + (last + 1) * width
            inside, near = (distances[mask] < limit).sum(), ((distances[mask] - limit).abs() < 1e-6).sum()
            assert abs(counts[: last + 1].sum() - inside) <= near


def test_the_curve_passes_through_the_rates_at_each_threshold() -> None:
    query, gallery, ids = made()
    blocks = list(distance_blocks(query, gallery))
    counts = count_pairs(blocks, ids, *distance_range(blocks, ids))
    about = describe_pairs(counts, unit_length=True)
    assert about["measure"] == "cosine"
    assert len(about["edges"]) == BARS + 1 == len(about["same_counts"]) + 1
    assert about["edges"] == sorted(about["edges"])
    assert about["edges"][-1] == pytest.approx(1 - counts.low / 2)
    assert sum(about["same_counts"]) == about["same_person"]
    assert sum(about["other_counts"]) == about["other_person"]
    distances, of_person = torch.cat(blocks), ids[0][:, None] == ids[1]
    same = distances[of_person & (ids[2][:, None] != ids[3])]
    other = distances[~of_person]
    assert len(about["roc"]) > 30
    assert about["roc"][-1] == [1.0, 1.0]
    ascending = [*other.sort().values.tolist(), math.inf]
    for accepted, found in about["roc"]:
        count = round(accepted * len(other))
        strict, loose = ((same <= limit).double().mean() for limit in ascending[count - 1 : count + 1])
        assert strict - 1e-9 <= found <= loose + 1e-9, "a threshold between the last pair accepted and the next one"


@pytest.mark.parametrize("distance", [0.0, 1.0, 1e30])
def test_equal_distances_have_one_bin(distance: float) -> None:
    ids = torch.tensor([1]), torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([1, 1])
    counts = count_pairs([torch.full((1, 2), distance)], ids, distance, distance)
    assert [int(kind.sum()) for kind in (counts.same, counts.other)] == [1, 1]
    about = describe_pairs(counts, unit_length=False)
    assert all(map(math.isfinite, about["edges"]))
    assert about["roc"] == [[1.0, 1.0]]


def test_no_pair_of_a_kind_gives_no_curve() -> None:
    none, some = torch.zeros(BINS, dtype=torch.int64), torch.ones(BINS, dtype=torch.int64)
    assert roc_curve(none, some) == roc_curve(some, none) == []


def test_nearest_images_leave_out_the_own_camera() -> None:
    query, gallery, ids = made()
    features, ranks = torch.cat([query, gallery]), parallel.start("cpu")
    distances, indices = nearest_images(features, 40, ids, ranks, 7)
    assert distances.shape == indices.shape == (40, 7)
    whole = torch.cdist(query.double(), gallery.double()).square()
    own = (ids[0][:, None] == ids[1]) & (ids[2][:, None] == ids[3])
    expected = whole.masked_fill(own, math.inf).sort(1)
    torch.testing.assert_close(distances, expected.values[:, :7], rtol=0, atol=1e-5)
    match = whole.masked_fill((ids[0][:, None] != ids[1]) | own, math.inf)
    for i in range(40):
        assert match[i, nearest_match(features, 40, ids, i)] == pytest.approx(match[i].min().item(), abs=1e-6)
