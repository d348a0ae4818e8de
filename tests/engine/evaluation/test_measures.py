"""Every measure against a loop over all pairs, all draws or all cameras."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionreid.engine.evaluation.measures import (
    bootstrap,
    camera_pairs,
    distance_blocks,
    expand_queries,
    operating_points,
    pool_queries,
    single_gallery_shot,
)
from fusionreid.engine.evaluation.retrieval import Gather, Ranking, RetrievalError, rank, rows_of_share
from tests.kernels.test_ranking import made_up, made_up_ids
from tests.numerics import assert_close


def case(num_query: int, num_gallery: int, persons: int, cameras: int, seed: int) -> tuple[Tensor, Tensor, tuple]:
    query, gallery = made_up(num_query, num_gallery, 4, "spread", seed)
    return query, gallery, made_up_ids(num_query, num_gallery, persons, cameras, seed)


def test_distance_blocks_are_those_of_the_features() -> None:
    query, gallery, _ = case(300, 20, 3, 2, 0)
    blocks = list(distance_blocks(query, gallery))
    assert len(blocks) > 1
    assert_close("distances", torch.cat(blocks), torch.cdist(query.double(), gallery.double()).square(), 1e-5)


def by_distance(query: Tensor, gallery: Tensor, ids: tuple[Tensor, ...]) -> Ranking:
    return rank(query, gallery, *ids, metric="euclidean", max_rank=1)


def test_camera_pairs_are_rankings_of_subsets() -> None:
    query, gallery, ids = case(30, 60, 5, 3, 1)
    pairs = {(p.query, p.gallery): p for p in camera_pairs(query, gallery, ids, by_distance)}
    assert pairs.keys() == {(a, b) for a, b in product(range(3), repeat=2) if a != b}
    for (a, b), pair in pairs.items():
        precisions, firsts = [], []
        for q in (ids[2] == a).nonzero().flatten():
            rows = (ids[3] == b).nonzero().flatten()
            order = rows[(gallery[rows] - query[q]).double().square().sum(1).argsort(stable=True)]
            hits = (ids[1][order] == ids[0][q]).nonzero().flatten() + 1
            if len(hits):
                precisions.append((torch.arange(1, len(hits) + 1) / hits).mean().item())
                firsts.append(hits[0].item() == 1)
        assert pair.num_valid == len(precisions)
        assert pair.mAP == pytest.approx(np.mean(precisions), abs=1e-6)
        assert pair.rank1 == pytest.approx(np.mean(firsts))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(levels=st.sampled_from([3, 1000]), block=st.integers(1, 9), seed=st.integers(0, 999))
def test_operating_points_equal_a_walk_over_all_thresholds(levels: int, block: int, seed: int) -> None:
    *_, ids = case(8, 30, 4, 3, seed)
    distances = torch.randint(0, levels, (8, 30), generator=torch.Generator().manual_seed(seed)).float()
    same, mine = ids[0][:, None] == ids[1], ids[2][:, None] == ids[3]
    positive, negative = distances[same & ~mine], distances[~same]
    rates = [0.001, 0.01, 0.3, 1.0]
    points = operating_points(distances.split(block), ids, rates)
    assert [p.false_positive_rate for p in points] == [rate for rate in rates if rate * len(negative) >= 1]
    for point in points:
        thresholds = [*distances.unique().tolist(), torch.inf]
        allowed = [t for t in thresholds if (negative < t).sum() <= int(point.false_positive_rate * len(negative))]
        best = max((positive < t).double().mean().item() for t in allowed)
        assert point.true_positive_rate == pytest.approx(best)
        assert (positive < point.distance).double().mean().item() == pytest.approx(best)
        assert (negative < point.distance).sum() <= point.false_positive_rate * len(negative)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(num_gallery=st.integers(3, 9), persons=st.integers(1, 4), seed=st.integers(0, 999))
def test_single_gallery_shot_is_the_mean_over_all_draws(num_gallery: int, persons: int, seed: int) -> None:
    query, gallery, ids = case(3, num_gallery, persons, 2, seed)
    distances = torch.cat(list(distance_blocks(query, gallery)))
    curves = []
    for row, person, camera in zip(distances, ids[0], ids[2]):
        valid = [g for g in range(num_gallery) if ids[1][g] != person or ids[3][g] != camera]
        images = [[g for g in valid if ids[1][g] == p] for p in ids[1].unique()]
        if not any(ids[1][g] == person for g in valid):
            continue
        found = []
        for drawn in product(*filter(None, images)):
            order = sorted(drawn, key=lambda g: row[g])
            place = next(i for i, g in enumerate(order) if ids[1][g] == person)
            found.append([float(place < r) for r in range(1, 6)])
        curves.append(np.mean(found, 0))
    if not curves:
        with pytest.raises(RetrievalError, match="no query has a match"):
            single_gallery_shot([distances], ids, max_rank=5)
    else:
        cmc = single_gallery_shot(distances.split(2), ids, max_rank=5)
        np.testing.assert_allclose(cmc.numpy(), np.mean(curves, 0), atol=1e-12)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999))
def test_single_gallery_shot_of_many_persons_is_an_exact_expectation(seed: int) -> None:
    """Far more persons than ranks, so that matches far behind are left out; with ties."""
    generator = torch.Generator().manual_seed(seed)
    persons, num_gallery = 400, 1500
    draw = partial(torch.randint, 0, generator=generator)
    ids = draw(persons, (5,)), draw(persons, (num_gallery,)), draw(3, (5,)), draw(3, (num_gallery,))
    distances = torch.randint(-300, 900, (5, num_gallery), generator=generator) / 64
    curves = []
    for row, person, camera in zip(distances, ids[0], ids[2]):
        matches = ((ids[1] == person) & (ids[3] != camera)).nonzero().flatten()
        number = torch.bincount(ids[1], minlength=persons)
        for match in matches:
            nearer = (row < row[match]) | ((row == row[match]) & (torch.arange(num_gallery) < match))
            share = torch.bincount(ids[1][nearer], minlength=persons).double() / number.clamp_min(1)
            share[person] = 0
            chance = np.ones(1)
            for p in share.tolist():
                chance = np.convolve(chance, [1 - p, p])
            curves.append(chance[:10].cumsum() / len(matches))
    valid = sum(bool(((ids[1] == person) & (ids[3] != camera)).any()) for person, camera in zip(ids[0], ids[2]))
    cmc = single_gallery_shot(distances.split(2), ids, max_rank=10)
    np.testing.assert_allclose(cmc.numpy(), np.sum(curves, 0) / valid, atol=1e-12)


@pytest.mark.parametrize("shares", [2, 9])
def test_shares_of_the_queries_have_the_measures_of_all(shares: int) -> None:
    """Threads stand for processes; of nine, two have none of the seven queries."""
    query, gallery, ids = case(7, 40, 4, 3, 6)
    barrier, given = threading.Barrier(shares), [torch.empty(0)] * shares

    def gather(rows: Tensor, index: int) -> Tensor:
        given[index] = rows
        barrier.wait()
        whole = torch.cat(given)
        barrier.wait()
        return whole

    def measure(index: int, shares: int, gather: Gather) -> list[float]:
        rows = rows_of_share(7, (index, shares))
        own, own_ids = query[rows], (ids[0][rows], ids[1], ids[2][rows], ids[3])
        points = operating_points(distance_blocks(own, gallery), own_ids, [0.1, 0.3], gather=gather)
        shot = single_gallery_shot(distance_blocks(own, gallery), own_ids, gather=gather)
        return [*(value for point in points for value in point), *shot.tolist()]

    expected = measure(0, 1, lambda rows: rows)
    with ThreadPoolExecutor(shares) as pool:
        for found in pool.map(lambda i: measure(i, shares, partial(gather, index=i)), range(shares)):
            assert found == pytest.approx(expected, rel=1e-6)


def test_pooled_queries_are_means_of_a_person_in_a_camera() -> None:
    query, _, ids = case(30, 5, 4, 2, 2)
    pooled, persons, cameras = pool_queries(query, ids[0], ids[2])
    groups = list(zip(persons.tolist(), cameras.tolist()))
    assert sorted(set(zip(ids[0].tolist(), ids[2].tolist()))) == groups
    for row, (person, camera) in zip(pooled, groups):
        mean = query[(ids[0] == person) & (ids[2] == camera)].mean(0)
        assert_close("pooled", row, mean / mean.norm(), 1e-6)


def test_expanded_queries_follow_the_definition() -> None:
    query, gallery = (F.normalize(x) for x in made_up(7, 20, 5, "spread", 3))
    expanded = expand_queries(query, gallery, 3, alpha=2.0)
    for row, q in zip(expanded, query):
        cosine = gallery @ q
        nearest = cosine.topk(3).indices
        total = q + (cosine[nearest].clamp_min(0).square()[:, None] * gallery[nearest]).sum(0)
        assert_close("expanded", row, total / total.norm(), 1e-6)
    assert_close("all", expand_queries(query, gallery, 99), expand_queries(query, gallery, 20), 1e-7)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        values = torch.rand(60, 1, generator=generator, dtype=torch.float64)
        low, high = bootstrap(values, level=0.9, repeats=200, seed=trial)
        covered += bool(low <= 0.5 <= high)
    assert 165 <= covered <= 195  # 180 expected, deviation 4.2
    same = bootstrap(torch.ones(5, 2))
    assert torch.equal(torch.stack(same), torch.ones(2, 2))


def test_values_of_each_query_have_the_means_of_the_ranking() -> None:
    query, gallery, ids = case(20, 60, 5, 3, 4)
    result = rank(query, gallery, *ids)
    assert len(result.first_ranks) == len(result.inverse_penalties) == result.num_valid
    assert result.inverse_penalties.mean().item() == result.mINP
    assert (result.first_ranks == 1).double().mean().item() == pytest.approx(result.cmc[0].item())
