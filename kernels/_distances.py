"""Squared Euclidean distances twice over: a fast fp32 product with a proven error bound, and fp64 for chosen pairs.

With normalize, rows are brought to unit length first (then the square is 2 - 2 cosine). "Exact" is the fp64 sum over
the coordinates of (q - g)^2: a function of the two rows alone, so that equal rows are equally far, to the last bit.

The bound: a sum of n rounded products in any order errs by at most n u / (1 - n u) times the sum of their magnitudes
(u = 2^-24; Higham, Accuracy and Stability, section 3.1), and that sum is at most |q| |g|. A product over all D columns
would make n = D; ours adds up products of CHUNK columns, so n = CHUNK + D / CHUNK. D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CHUNK = 256  # columns per product
EXACT_ROWS, EXACT_ELEMENTS = 1024, 2**18  # most of one fp64 batch: it stays in a core's cache
UNIT = 2.0**-24
LONGEST = 1e18  # of a row: its square is still an fp32 number


class Rows:
    """A matrix of features (N, D) on its device, or on disk behind a memory map, with the length of every row."""

    def __init__(self, name: str, features: Tensor, normalize: bool) -> None:
        if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
            raise ValueError(f"{name} must be floating (N, D), neither of them 0, got {tuple(features.shape)}")
        self.features = features
        self.batch = max(1, min(EXACT_ROWS, EXACT_ELEMENTS // features.shape[1]))
        length = torch.empty(len(features), dtype=torch.float64, device=features.device)
        size = min(self.batch, len(features))
        rows = torch.empty(size, features.shape[1], dtype=torch.float64, device=features.device)
        for start in range(0, len(features), size):
            block = slice(min(start, len(features) - size), min(start + size, len(features)))
            length[block] = (
                rows.copy_(features[block]).square_().sum(1).sqrt()
            )  # `size` rows: equal rows, equal lengths
        bad = (~(length < LONGEST)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name}: {len(bad)} of {len(features)} rows are not finite or too long, first {bad[:5]}")
        self.scale = 1 / length.clamp_min(1e-12) if normalize else torch.ones_like(length)
        self.length = length * self.scale

    @classmethod
    def both(cls, query: Tensor, gallery: Tensor, normalize: bool) -> tuple["Rows", "Rows"]:
        if query.shape[1:] != gallery.shape[1:] or query.dtype != gallery.dtype:
            raise ValueError(
                f"query and gallery must be features of one model, equally wide and of one type, "
                f"got {tuple(query.shape)} {query.dtype} and {tuple(gallery.shape)} {gallery.dtype}"
            )
        items = cls("gallery", gallery, normalize)
        return items if query is gallery else cls("query", query, normalize), items

    def __len__(self) -> int:
        return len(self.features)


def exact_distances(query: Rows, gallery: Rows, q: Tensor, g: Tensor) -> Tensor:
    """Squared distances (P,) in fp64 of the pairs (q[p], g[p]), in batches of one size whatever P."""
    distances = torch.empty(len(q), dtype=torch.float64, device=q.device)
    given = gallery.features.new_empty(gallery.batch, gallery.features.shape[1])  # fresh memory would cost more than
    difference, other = (torch.empty_like(given, dtype=torch.float64) for _ in range(2))  # all the arithmetic
    for start in range(0, len(q), gallery.batch):
        pairs = torch.arange(start, start + gallery.batch, device=q.device).clamp_(max=len(q) - 1)
        for rows, index, out in ((gallery, g[pairs], difference), (query, q[pairs], other)):
            torch.index_select(rows.features, 0, index, out=given)
            out.copy_(given).mul_(rows.scale[index, None])
        distances[start : start + gallery.batch] = difference.sub_(other).square_().sum(1)[: len(q) - start]
    return distances


def scaled(rows: Rows, block: slice) -> Tensor:
    """A block of rows in fp32, at unit length if normalised."""
    return rows.features[block].float() * rows.scale[block, None].float()


def fast_distances(query: Tensor, gallery: Rows, size: int) -> Iterator[tuple[slice, Tensor]]:
    """|q - g|^2 - |q|^2 in fp32, within `error_bound`: scaled queries (b, D) against `size` gallery rows at a time.

    The distances (b, size) may be overwritten; they are gone when the next ones are asked for.
    """
    memory = query.new_empty(2, len(query) * min(size, len(gallery)))
    for start in range(0, len(gallery), size):
        block = slice(start, min(start + size, len(gallery)))
        total, part = memory[:, : len(query) * (block.stop - start)].view(2, len(query), -1)
        columns = gallery.features[block].float().T
        torch.mm(query[:, :CHUNK], columns[:CHUNK], out=total)
        for first in range(CHUNK, query.shape[1], CHUNK):
            total += torch.mm(query[:, first : first + CHUNK], columns[first : first + CHUNK], out=part)
        square, scale = gallery.length[block].square().float(), gallery.scale[block].float()
        yield block, torch.addcmul(square, total, scale, value=-2, out=total)


def error_bound(query: Rows, gallery: Rows, block: slice) -> Tensor:
    """How far `fast_distances` of a block of queries can be off, including thresholds rounded to fp32 (b,)."""
    width = gallery.features.shape[1]
    terms = min(CHUNK, width) + width // CHUNK + 16  # 16: the roundings of inputs, scales, lengths, sum and threshold
    longest = gallery.length.max()
    relative = 1.01 * UNIT * (2 * terms * query.length[block] * longest + 8 * longest.square())
    return relative + 1e-37 * width * gallery.scale.max()  # the last term: products below fp32's normal range


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32, no graph."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
