"""The public list of ops: each has a reference implementation in `fusionreid.kernels.reference`.

An op is imported when it is first asked for, so that a search does not load what only a model needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionreid.kernels._exact_distances import full_precision
    from fusionreid.kernels.augmentation import augment
    from fusionreid.kernels.class_attention import ClassStream, dual_cross_attention
    from fusionreid.kernels.cross_entropy import smoothed_cross_entropy
    from fusionreid.kernels.dual_attention import dual_self_attention
    from fusionreid.kernels.neighbours import Neighbours, nearest_neighbours, neighbour_lists
    from fusionreid.kernels.ranking import RankCounts, rank_counts, rank_counts_of
    from fusionreid.kernels.triplet import BatchHard, batch_hard_triplet

__all__ = [
    "BatchHard",
    "ClassStream",
    "Neighbours",
    "RankCounts",
    "augment",
    "batch_hard_triplet",
    "dual_cross_attention",
    "dual_self_attention",
    "full_precision",
    "nearest_neighbours",
    "neighbour_lists",
    "rank_counts",
    "rank_counts_of",
    "smoothed_cross_entropy",
]
FILES = {
    "_exact_distances": ("full_precision",),
    "augmentation": ("augment",),
    "class_attention": ("ClassStream", "dual_cross_attention"),
    "cross_entropy": ("smoothed_cross_entropy",),
    "dual_attention": ("dual_self_attention",),
    "neighbours": ("Neighbours", "nearest_neighbours", "neighbour_lists"),
    "ranking": ("RankCounts", "rank_counts", "rank_counts_of"),
    "triplet": ("BatchHard", "batch_hard_triplet"),
}


def __getattr__(name: str) -> Any:
    for file, names in FILES.items():
        if name in names:
            return getattr(import_module(f"fusionreid.kernels.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
