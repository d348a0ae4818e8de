"""How many gallery images come before every match, on a GPU: products of 8-bit integers, counted as they are made.

A row is split into integers (x = step (x0 + x1 / 254 + x2 / 254^2) + rest, see `ranking_kernels`), and of x y six of
the nine products of integers are summed on tensor cores, in int32: exactly, as 3 * 127^2 * WIDEST < 2^31. A sum of
half-precision products would hang on how a GPU rounds inside its matrix instructions, which no maker says.

The bound. Let n1, n2, n3 be the norms of the parts x1 and x2 and of the rest, in the features' unit. Left out of x y is
x1 y2 + x2 y1 + x2 y2 + rest_x y + (x - rest_x) rest_y, by Cauchy and Schwarz at most

    n1 n2' + n2 n1' + n2 n2' + n3 |y| + (|x| + n3) n3'.

Sums and steps are then rounded to fp32 and joined: 11 roundings of u = 2^-24 at most, of numbers no larger in sum than
A A', with A = |x| + 2 (n1 + n2 + n3) and so at least the norms of all parts together. Twice that, and a rounding each
of |y|^2, of |y|^2 - 2 x y and of the threshold, make 26 u A A' + 3 u |y|^2. In all some 70 u for unit rows of 5888
normal coordinates, a quarter of the bound of an fp32 product in chunks.
Q queries, G gallery, T most matches of one query.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fusionreid.kernels import ranking_kernels
from fusionreid.kernels._distances import UNIT, exact_distances
from fusionreid.kernels._path import TRITON, capability
from fusionreid.kernels._rows import Rows

WIDEST = 2**15  # columns
QUERIES, SPAN = 2**14, 2**14  # queries and gallery rows at once: 3 D bytes each
CAPACITY = 2**22  # open pairs of a span that can be noted down, 8 bytes each
TILE = 128  # split rows are padded to whole tiles
BLOCK_D = 64


class Split(NamedTuple):
    """Rows as integers, the last ones zero, up to whole tiles."""

    parts: Tensor  # (rows, 3 * columns) int8
    steps: Tensor  # (rows,) fp32
    norms: Tensor  # (3, rows) fp64: of x1, of x2, of the rest


def split_rows(rows: Rows, index: Tensor) -> Split:
    """Some rows, at unit length if normalised."""
    count, width = triton.cdiv(len(index), TILE) * TILE, rows.features.shape[1]
    parts = index.new_empty(count, 3 * BLOCK_D * triton.cdiv(width, BLOCK_D), dtype=torch.int8)
    steps, norms = torch.empty_like(parts[:, 0], dtype=torch.float32), rows.scale.new_empty(3, count)
    ranking_kernels.split[(count // 16,)](
        rows.features, index, rows.scale, parts, steps, norms, len(index), width,
        parts.stride(0), BASE=ranking_kernels.BASE, BLOCK_D=BLOCK_D, ROWS=16, BLOCK=64, num_warps=4,
    )  # fmt: skip
    return Split(parts, steps, norms)


def count_span(
    query: Split, gallery: Split, persons: tuple[Tensor, Tensor], squares: Tensor, edges: tuple[Tensor, Tensor],
    tally: Tensor, noted: Tensor, pairs: Tensor,
) -> None:  # fmt: skip
    """Of a span of the gallery: how many come surely before each match is added to tally (T, Q).

    persons (Q,) and (G,) int32, squares (G,) fp32, edges (T, Q) fp32 each; noted (1,): how many pairs are open;
    pairs (2, capacity) int32: their match and column.
    """
    setting = launch()
    tiles = triton.cdiv(len(persons[0]), setting["ROWS"]) * triton.cdiv(len(persons[1]), setting["COLUMNS"])
    ranking_kernels.count[(tiles,)](
        query.parts, query.steps, persons[0], gallery.parts, gallery.steps, squares, persons[1], *edges, tally,
        noted, pairs, len(persons[0]), len(persons[1]), len(tally),
        query.parts.stride(0), CAPACITY=pairs.shape[1], BASE=ranking_kernels.BASE, BLOCK_D=BLOCK_D, **setting,
    )  # fmt: skip


def launch() -> dict[str, int]:
    """Three sums per pair fill Hopper's registers with a tile of 128 x 128, and those of others, or of compilers before
    Triton 3.8, with half of it."""
    return {
        "ROWS": 128,
        "COLUMNS": 128 if capability() == 90 and TRITON >= (3, 8) else 64,
        "GROUP": 12,
        "num_warps": 8,
        "num_stages": 3,
    }


def error_bound(query: Split, gallery: Split, length: Tensor, longest: Tensor, width: int) -> Tensor:
    """How far |y|^2 - 2 x y and a query's rounded threshold can be off (Q,); length (Q,), longest of the gallery ()."""
    n1, n2, n3 = query.norms[:, : len(length)]
    m1, m2, m3 = gallery.norms.amax(1)
    left_out = n1 * m2 + n2 * m1 + n2 * m2 + n3 * longest + (length + n3) * m3
    rounded = 26 * (length + 2 * (n1 + n2 + n3)) * (longest + 2 * (m1 + m2 + m3)) + 3 * longest.square()
    in_double = 8 * (width + 16) * 2.0**-53 * (length + longest).square()  # the exact distances, the lengths
    return 1.01 * (2 * left_out + UNIT * rounded) + in_double + 1e-36  # the last: products below fp32's normal range


def tally_features(
    queries: Rows, items: Rows, block: Tensor, distances: Tensor, indices: Tensor, counts: Tensor,
    query_persons: Tensor, gallery_persons: Tensor,
) -> tuple[Tensor, int] | None:  # fmt: skip
    """For matches (b, T) of a block of queries, nearest first: how many images of other persons come before each, and
    how many pairs took fp64. None where too many would."""
    place = counts - 1 - torch.arange(distances.shape[1], device=counts.device)[:, None]  # (T, b): farthest first
    exists, place = place >= 0, place.clamp_min(0)
    thresholds, first = distances.T.gather(0, place), indices.T.gather(0, place)
    centre = thresholds - queries.length[block].square()
    persons = torch.cat([query_persons, gallery_persons]).unique(return_inverse=True)[1].int()
    mine, theirs = persons[: len(block)], persons[len(block) :]
    tally = torch.zeros(place.shape, dtype=torch.int32, device=counts.device)
    noted_pairs = torch.empty(2, CAPACITY, dtype=torch.int32, device=counts.device)
    recomputed = 0
    query = split_rows(queries, block)
    for start, part in items.spans(SPAN) if tally.numel() else ():
        gallery, noted = split_rows(part, torch.arange(len(part), device=counts.device)), counts.new_zeros(1)
        bound = error_bound(query, gallery, queries.length[block], part.length.max(), part.features.shape[1])
        edges = tuple((centre + side).where(exists, -torch.inf).float() for side in (-bound, bound))
        others, squares = theirs[start : start + len(part)], part.length.square().float()
        count_span(query, gallery, (mine, others), squares, edges, tally, noted, noted_pairs)
        number = int(noted)
        if number > CAPACITY:
            return None
        match, column = noted_pairs[:, :number].long()
        pairs, pair = (match % len(block) * len(part) + column).unique(return_inverse=True)  # once for all matches
        distance = exact_distances(queries, part, block[pairs // len(part)], pairs % len(part))[pair]
        threshold = thresholds.flatten()[match]
        before = (distance < threshold) | ((distance == threshold) & (start + column < first.flatten()[match]))
        tally.view(-1).index_add_(0, match, before.int())
        recomputed += len(pairs)
    return tally.gather(0, place).T.long(), recomputed
