"""Distances of all pairs of a query and a gallery image, counted in bins: of one person, and of two.

A pair of one person counts if two cameras took it, as in the ranking. The counts give the histogram of the cosines and
the ROC curve in constant memory: one pass finds how far the distances reach, another counts.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusionreid.engine.evaluation.measures import Ids, with_ids
from fusionreid.engine.evaluation.retrieval import Gather

BINS = 2000  # of squared distances
BARS = 50  # of the histogram
CURVE_POINTS = 61  # of the ROC curve, evenly spaced in the logarithm of the rate


class PairCounts(NamedTuple):
    """Pairs of one person and of two by squared distance, (BINS,) int64 each, in equal bins from `low` to `high`."""

    same: Tensor
    other: Tensor
    low: float
    high: float


def distance_range(blocks: Iterable[Tensor], ids: Ids, *, gather: Gather = lambda rows: rows) -> tuple[float, float]:
    """Return the least and the largest squared distance of a pair."""
    low, high = math.inf, -math.inf
    for block, (person, gallery_person, camera, gallery_camera) in with_ids(blocks, ids):
        if not len(block):  # of many processes some have no query
            continue
        junk = (gallery_person == person[:, None]) & (gallery_camera == camera[:, None])
        low = min(low, block.masked_fill(junk, math.inf).min().item())
        high = max(high, block.masked_fill(junk, -math.inf).max().item())
    ends = gather(torch.tensor([[low, -high]], dtype=torch.float64)).amin(0)
    return ends[0].item(), -ends[1].item()


def count_pairs(
    blocks: Iterable[Tensor], ids: Ids, low: float, high: float, *, gather: Gather = lambda rows: rows
) -> PairCounts:
    """Count the pairs whose squared distances reach from `low` to `high`."""
    high = max(high, low + 1e-12, low * (1 + 1e-6))  # all may be equal
    same, other = torch.zeros(BINS, dtype=torch.int64), torch.zeros(BINS, dtype=torch.int64)
    for block, (person, gallery_person, camera, gallery_camera) in with_ids(blocks, ids):
        place = ((block.double() - low) * (BINS / (high - low))).long().clamp_(0, BINS - 1)
        of_person = gallery_person == person[:, None]
        matches = of_person & (gallery_camera != camera[:, None])
        same += torch.bincount(place[matches], minlength=BINS).cpu()
        other += torch.bincount(place[~of_person], minlength=BINS).cpu()
    counts = gather(torch.stack([same, other])[None]).sum(0)
    return PairCounts(counts[0], counts[1], low, high)


def describe_pairs(counts: PairCounts, *, unit_length: bool) -> dict[str, Any]:
    """Make the histogram and the ROC curve, for metrics.json.

    The histogram is over cosines where the features have unit length, else over distances; edges ascend. A point of
    the curve is the share of pairs of two persons that are accepted, and the share of pairs of one that are.
    """
    squared = torch.linspace(counts.low, counts.high, BARS + 1, dtype=torch.float64)
    edges = (1 - squared / 2).flip(0) if unit_length else squared.clamp_min(0).sqrt()
    bars = [kind.view(BARS, -1).sum(1) for kind in (counts.same, counts.other)]
    bars = [kind.flip(0) if unit_length else kind for kind in bars]
    return {
        "measure": "cosine" if unit_length else "distance",
        "same_person": int(counts.same.sum()),
        "other_person": int(counts.other.sum()),
        "edges": edges.tolist(),
        "same_counts": bars[0].tolist(),
        "other_counts": bars[1].tolist(),
        "roc": roc_curve(counts.same, counts.other),
    }


def roc_curve(same: Tensor, other: Tensor) -> list[list[float]]:
    """Return points (false positive rate, true positive rate), both ascending to (1, 1), of counts (BINS,)."""
    if not (same.any() and other.any()):
        return []
    accepted, found = other.cumsum(0).double() / other.sum(), same.cumsum(0).double() / same.sum()
    rates = torch.logspace(-torch.log10(other.sum().double()).item(), 0, CURVE_POINTS, dtype=torch.float64)
    last = torch.searchsorted(accepted, rates * (1 + 1e-12), right=True) - 1  # the loosest bin below each rate
    bins = last[last >= 0].unique()
    points: list[list[float]] = torch.stack([accepted[bins], found[bins]], 1).tolist()
    return [point for point in points if point[0] > 0]
