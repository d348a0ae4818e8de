"""The public list of ops: each has its twin in plain torch, without tricks, in `kernels.reference`."""

from kernels._distances import full_precision
from kernels.augmentation import augment
from kernels.class_attention import ClassStream, dual_cross_attention
from kernels.cross_entropy import smoothed_cross_entropy
from kernels.dual_attention import dual_self_attention
from kernels.neighbours import Neighbours, nearest_neighbours, neighbour_lists
from kernels.ranking import RankCounts, rank_counts, rank_counts_of
from kernels.triplet import BatchHard, batch_hard_triplet

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
