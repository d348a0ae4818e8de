"""k-reciprocal re-ranking: the recorded results, and a dense loop that follows the paper line by line."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionreid.engine.evaluation import rerank
from fusionreid.engine.evaluation.rerank import k_reciprocal, rerank_blocks
from tests.engine.evaluation.test_retrieval import recorded
from tests.kernels.test_ranking import made_up
from tests.numerics import assert_close

RECORDED = recorded("ranking")
NUM_QUERY = int(RECORDED["small/num_query"])
FEATURES = RECORDED["small/feat"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (50, 15, 0.3), (20, 1, 0.3), (7, 3, 0.5)])
def test_recorded_results(k1: int, k2: int, weight: float, dtype: torch.dtype) -> None:
    result = k_reciprocal(FEATURES[:NUM_QUERY].to(dtype), FEATURES[NUM_QUERY:].to(dtype), k1, k2, weight)
    assert result.dtype == dtype
    assert_close("re-ranked", result, RECORDED[f"small/rerank_{k1}_{k2}_{weight}_double"], 1e-6)


def test_recorded_result_without_normalisation() -> None:
    result = k_reciprocal(FEATURES[:NUM_QUERY], FEATURES[NUM_QUERY:], metric="euclidean")
    assert_close("re-ranked", result, RECORDED["small/rerank_20_6_unnormalised"], 4e-3)  # recorded in half precision


def dense(query: Tensor, gallery: Tensor, k1: int, k2: int, weight: float) -> np.ndarray:
    x = torch.cat([query, gallery]).double()
    squared = (x[:, None] - x).square().sum(2).numpy()
    scaled = squared / squared.max(1, keepdims=True)
    order = squared.argsort(1, kind="stable")
    half = round(k1 / 2)

    def reciprocal(i: int, k: int) -> list[int]:
        return [j for j in order[i, : k + 1] if i in order[j, : k + 1]]

    v = np.zeros_like(scaled)
    for i in range(len(x)):
        own = reciprocal(i, k1)
        members = set(own)
        for j in own:
            theirs = reciprocal(j, half)
            if len(set(theirs) & set(own)) > 2 / 3 * len(theirs):
                members |= set(theirs)
        columns = sorted(members)
        v[i, columns] = np.exp(-scaled[i, columns])
        v[i] /= v[i].sum()
    v = np.stack([v[order[i, :k2]].mean(0) for i in range(len(x))])
    overlap = np.minimum(v[:, None], v).sum(2)
    return ((1 - weight) * (1 - overlap / (2 - overlap)) + weight * scaled)[: len(query), len(query) :]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    num_query=st.integers(1, 9),
    num_gallery=st.integers(1, 40),
    k1=st.integers(1, 24),
    k2=st.integers(1, 8),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    at_once=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equals_the_dense_loop(
    num_query: int, num_gallery: int, k1: int, k2: int, weight: float, at_once: bool, seed: int
) -> None:
    query, gallery = made_up(num_query, num_gallery, 4, "spread", seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rerank, "BLOCK_ROWS", 4)
        patch.setattr(rerank, "DISTANCES", 4 * num_gallery)
        if at_once:  # as on a GPU
            patch.setattr(rerank, "PAIRS", 100)
            patch.setattr(rerank, "_meet_by_column", rerank._meet_all_at_once)
        result = k_reciprocal(query.double(), gallery.double(), k1, k2, weight, metric="euclidean")
    np.testing.assert_allclose(result.numpy(), dense(query, gallery, k1, k2, weight), rtol=0, atol=1e-6)


def test_blocks_are_the_rows_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerank, "DISTANCES", 256 * 60)
    query, gallery = made_up(300, 60, 5, "spread", 0)
    blocks = list(rerank_blocks(torch.cat([query, gallery]), len(query)))
    assert [len(block) for block in blocks] == [256, 44]
    assert torch.equal(torch.cat(blocks), k_reciprocal(query, gallery))


@pytest.mark.parametrize("shares", [2, 5])
def test_shares_that_exchange_their_parts_give_the_whole(shares: int) -> None:
    query, gallery = made_up(9, 40, 5, "spread", 0)
    barrier, held = threading.Barrier(shares), [torch.empty(0)] * shares

    def work(index: int) -> Tensor:
        def gather(rows: Tensor) -> Tensor:
            held[index] = rows
            barrier.wait()
            whole = torch.cat(held)
            barrier.wait()
            return whole

        blocks = rerank_blocks(torch.cat([query, gallery]), 9, 7, 3, share=(index, shares), gather=gather)
        return torch.cat([gallery.new_zeros(0, 40), *blocks])

    with ThreadPoolExecutor(shares) as pool:
        parts = list(pool.map(work, range(shares)))
    assert_close("re-ranked", torch.cat(parts), k_reciprocal(query, gallery, 7, 3), 1e-6)


def test_autocast_changes_nothing() -> None:
    query, gallery = made_up(9, 40, 5, "spread", 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = k_reciprocal(query, gallery)
    assert torch.equal(result, k_reciprocal(query, gallery))


def test_products_are_those_of_float32_whatever_the_program_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, product, met = torch.backends.cuda.matmul, torch.addmm, []
    monkeypatch.setattr(torch, "addmm", lambda *a, **b: met.append(backend.fp32_precision) or product(*a, **b))
    backend.fp32_precision = "tf32"
    try:
        k_reciprocal(*made_up(9, 40, 5, "spread", 0))
        assert met == ["ieee"]
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = "none"


def test_equal_images_stay_finite() -> None:
    assert k_reciprocal(torch.ones(3, 4), torch.ones(8, 4)).isfinite().all()


@pytest.mark.parametrize(("k1", "k2", "weight"), [(0, 6, 0.3), (20, 0, 0.3), (20, 6, 1.5)])
def test_parameters_are_checked(k1: int, k2: int, weight: float) -> None:
    with pytest.raises(ValueError, match="re-ranking needs"):
        k_reciprocal(torch.ones(2, 2), torch.ones(2, 2), k1, k2, weight)
