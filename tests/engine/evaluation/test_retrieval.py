"""The protocol: recorded mAP and CMC, every measure by hand, sharding, rank lists, and errors that explain."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionreid.engine.evaluation.retrieval import Ranking, rank, rank_blocks, top_k
from tests.kernels.test_ranking import made_up, made_up_ids
from tests.numerics import FIXTURES, assert_close

IDS = ("q_pids", "g_pids", "q_camids", "g_camids")


def recorded(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / "modules" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(value) for key, value in arrays.items()}


@pytest.mark.parametrize("case", ["plain", "short_gallery", "ties", "rank10"])
def test_recorded_distance_matrices(case: str) -> None:
    arrays = {key.split("/")[1]: value for key, value in recorded("eval_func").items() if key.startswith(case)}
    ids, max_rank = [arrays[name] for name in IDS], int(arrays["max_rank"])
    result = rank_blocks(arrays["distmat"].split(4), *ids, max_rank=max_rank)
    assert result.mAP == pytest.approx(arrays["mAP_stable"].item(), abs=1e-12)
    assert result.cmc.shape == (max_rank,)
    assert_close("cmc", result.cmc[: len(arrays["cmc_stable"])], arrays["cmc_stable"], 1e-6)
    assert (result.cmc[len(arrays["cmc_stable"]) :] == result.cmc[-1]).all()


@pytest.mark.parametrize(("metric", "case"), [("cosine", "norm"), ("euclidean", "nonorm"), ("cosine", "string_no")])
def test_recorded_evaluator(metric: str, case: str) -> None:
    arrays = recorded("ranking")
    num_query = int(arrays["small/num_query"])
    persons, cameras = arrays["small/pids"], arrays["small/camids"]
    sides = (slice(None, num_query), slice(num_query, None))
    features, ids = [arrays["small/feat"][s] for s in sides], [t[s] for t in (persons, cameras) for s in sides]
    result = rank(*features, *ids, metric=metric)
    assert result.mAP == pytest.approx(arrays[f"small/{case}/mAP"].item(), abs=1e-12)
    assert_close("cmc", result.cmc, arrays[f"small/{case}/cmc"], 1e-6)


def test_measures_of_a_ranking_done_by_hand() -> None:
    gallery = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    #        junk of query 0 ^  match 0 ^          match 0 ^
    result = rank(
        torch.zeros(3, 1), gallery, [7, 8, 9], [7, 7, 1, 8, 7, 2], [0, 1, 0], [0, 1, 0, 2, 2, 1], metric="euclidean"
    )
    assert result.ranks.tolist() == [1, 4, 4]  # query 0 without its junk; query 1; query 2 has no match
    assert (result.num_valid, result.num_unmatched) == (2, 1)
    assert result.mAP == pytest.approx(((1 / 1 + 2 / 4) / 2 + 1 / 4) / 2)
    assert result.mINP == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert result.cmc[:5].tolist() == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert result.summary().startswith("mAP 50.0 %, mINP 37.5 %, Rank-1 50.0 %, Rank-5 100.0 %, Rank-10 100.0 %")
    assert result.summary().endswith("(2 queries, 1 without a match left out)")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(num_query=st.integers(1, 9), shares=st.integers(1, 5), seed=st.integers(0, 999))
def test_merged_shares_equal_the_whole(num_query: int, shares: int, seed: int) -> None:
    features = made_up(num_query, 40, 4, "spread", seed)
    ids = made_up_ids(num_query, 40, 3, 3, seed)
    whole = rank(*features, *ids)
    merged = Ranking.merge([rank(*features, *ids, share=(i, shares)) for i in range(shares)])
    assert torch.equal(merged.ranks, whole.ranks)
    assert torch.equal(merged.offsets, whole.offsets)
    assert (merged.mAP, merged.mINP, merged.cmc.tolist()) == (whole.mAP, whole.mINP, whole.cmc.tolist())


def test_rank_lists_hold_no_junk() -> None:
    gallery = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    ids = [5, 6], [5, 5, 6, 5], [0, 1], [0, 1, 1, 0]
    distances, indices = top_k(torch.zeros(2, 1), gallery, *ids, k=3, metric="euclidean")
    assert indices.tolist() == [[1, 2, -1], [0, 1, 3]]
    assert distances.tolist() == [[4, 9, float("inf")], [1, 4, 16]]
    assert top_k(torch.zeros(2, 1), gallery, *ids, k=6)[1].shape == (2, 6)


def test_no_match_at_all_explains_the_camera_rule() -> None:
    with pytest.raises(
        ValueError, match=r"another camera took it.*2 of them have.*queries: \[3\], of the gallery: \[3\]"
    ):
        rank(torch.ones(2, 3), torch.ones(4, 3), [1, 2], [1, 2, 1, 2], [3, 3], [3, 3, 3, 3])


def test_bad_input_is_named() -> None:
    one, two = torch.ones(1, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="gallery has no image"):
        rank(one, torch.ones(0, 3), [1], [], [0], [])
    with pytest.raises(ValueError, match=r"gallery_cameras must hold one id for each of the 2 features, got \(3,\)"):
        rank(one, two, [1], [1, 1], [0], [1, 1, 1])
    with pytest.raises(ValueError, match="metric must be 'cosine' or 'euclidean', got 'l2'"):
        rank(one, two, [1], [1, 1], [0], [1, 1], metric="l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks have 1 rows for 2 queries"):
        rank_blocks([torch.ones(1, 2)], [1, 1], [1, 1], [0, 0], [1, 1])
