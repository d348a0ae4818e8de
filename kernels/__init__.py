"""The public list of ops: each has its twin in plain torch, without tricks, in `fusionreid.kernels.reference`."""

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
