"""Squared Euclidean distances three times over: a fast fp32 product of all pairs and, for chosen pairs, fp32 products
summed in fp64, both with a proven error bound, and fp64 throughout.

With normalize, rows are brought to unit length first (then the square is 2 - 2 cosine). "Exact" is the fp64 sum over
the coordinates of (q - g)^2: a function of the two rows alone, so that equal rows are equally far, to the last bit.

The bound: a sum of n rounded products in any order errs by at most n u / (1 - n u) times the sum of their magnitudes
(u = 2^-24; Higham, Accuracy and Stability, section 3.1), and that sum is at most |q| |g|. A product over all D columns
would make n = D; ours adds up products of CHUNK columns in groups, so n is about CHUNK + 2 sqrt(D / CHUNK). D width.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

from fusionreid.kernels import ranking_kernels
from fusionreid.kernels._path import on_device_of, use_triton
from fusionreid.kernels._rows import Rows

CHUNK = 128  # columns per product
CLOSE_ELEMENTS = 2**19  # of one batch of fp32 products
FETCHED = 2**13  # pairs whose rows are brought to the device at once
UNIT = 2.0**-24


def exact_distances(query: Rows, gallery: Rows, q: Tensor, g: Tensor) -> Tensor:
    """Squared distances (P,) in fp64 of the pairs (q[p], g[p]), in batches of one size whatever P."""
    distances = torch.empty(len(q), dtype=torch.float64, device=q.device)
    if gallery.elsewhere:
        for pairs in g.argsort().split(FETCHED):  # each row comes about once
            rows, place = g[pairs].unique(return_inverse=True)
            part = gallery.part(rows, gallery.features[rows.to(gallery.features.device)].to(q.device))
            distances[pairs] = exact_distances(query, part, q[pairs], place)
        return distances
    if use_triton(query.features):
        if len(q):
            ranking_kernels.distances[(triton.cdiv(len(q), 16),)](
                query.features, gallery.features, query.scale, gallery.scale, q.contiguous(), g.contiguous(),
                distances, len(q), query.features.shape[1], PAIRS=16, BLOCK=128, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        return distances
    given = gallery.features.new_empty(gallery.batch, gallery.features.shape[1])  # fresh memory would cost more than
    difference, other = (torch.empty_like(given, dtype=torch.float64) for _ in range(2))  # all the arithmetic
    for start in range(0, len(q), gallery.batch):
        pairs = torch.arange(start, start + gallery.batch, device=q.device).clamp_(max=len(q) - 1)
        for rows, index, out in ((gallery, g[pairs], difference), (query, q[pairs], other)):
            torch.index_select(rows.features, 0, index, out=given)
            out.copy_(given)
            if rows.normalized:
                out.mul_(rows.scale[index, None])
        distances[start : start + gallery.batch] = difference.sub_(other).square_().sum(1)[: len(q) - start]
    return distances


def close_distances(query: Rows, gallery: Rows, q: Tensor, g: Tensor) -> Tensor:
    """The same within `close_bound`, in half the time or less: coordinates multiplied in fp32, summed in fp64."""
    distances = query.length[q].square() + gallery.length[g].square()
    size, width = max(1, CLOSE_ELEMENTS // gallery.features.shape[1]), gallery.features.shape[1]
    theirs, ours = (rows.features.new_empty(min(size, len(q)), width) for rows in (gallery, query))
    for start in range(0, len(q), size):
        pairs = slice(start, min(start + size, len(q)))
        x, y = (buffer[: pairs.stop - start] for buffer in (theirs, ours))
        torch.index_select(gallery.features, 0, g[pairs], out=x)
        torch.index_select(query.features, 0, q[pairs], out=y)
        x, y = (t if t.dtype.itemsize >= 4 else t.float() for t in (x, y))
        dot = x.mul_(y).sum(1, dtype=torch.float64)
        distances[pairs] -= 2 * gallery.scale[g[pairs]] * query.scale[q[pairs]] * dot
    return distances


def scaled(rows: Rows, block: slice | Tensor) -> Tensor:
    """Some rows in fp32, at unit length if normalised."""
    return rows.features[block].float() * rows.scale[block, None].float()


def fast_distances(query: Tensor, gallery: Rows, size: int) -> Iterator[tuple[slice, Tensor]]:
    """|q - g|^2 - |q|^2 in fp32, within `error_bound`: scaled queries (b, D) against `size` gallery rows at a time.

    The distances (b, size) may be overwritten; they are gone when the next ones are asked for.
    """
    memory = query.new_empty(3, len(query) * min(size, len(gallery)))
    for start in range(0, len(gallery), size):
        block = slice(start, min(start + size, len(gallery)))
        yield block, fast_tile(query, gallery, block, memory)


def fast_tile(query: Tensor, gallery: Rows, block: slice, memory: Tensor) -> Tensor:
    """`fast_distances` of one block of the gallery (b, block), in memory (3, at least that many) of the caller."""
    width, group = query.shape[1], CHUNK * _chunks_per_group(query.shape[1])
    total, part, chunk = memory[:, : len(query) * (block.stop - block.start)].view(3, len(query), -1)
    columns = gallery.features[block].to(query.device).float().T
    for first in range(0, width, group):
        into = part if first else total
        torch.mm(query[:, first : first + CHUNK], columns[first : first + CHUNK], out=into)
        for begin in range(first + CHUNK, min(first + group, width), CHUNK):
            into += torch.mm(query[:, begin : begin + CHUNK], columns[begin : begin + CHUNK], out=chunk)
        if first:
            total += part
    square, scale = gallery.length[block].square().float(), gallery.scale[block].float()
    return torch.addcmul(square, total, scale, value=-2, out=total)


def error_bound(query: Rows, gallery: Rows, block: slice | Tensor) -> Tensor:
    """How far `fast_distances` of a block of queries can be off, including thresholds rounded to fp32 (b,)."""
    width = gallery.features.shape[1]
    group = _chunks_per_group(width)
    terms = min(CHUNK, width) + group + -(-width // (group * CHUNK)) + 8  # 8: inputs, scales, sum and threshold
    longest = gallery.length.max()
    relative = 1.01 * UNIT * (2 * terms * query.length[block] * longest + 4 * longest.square())
    return relative + 1e-37 * width * gallery.scale.max()  # the last term: products below fp32's normal range


def _chunks_per_group(width: int) -> int:
    return math.isqrt(-(-width // CHUNK) - 1) + 1


def close_bound(query: Rows, gallery: Rows, rows: Tensor) -> Tensor:
    """How far `close_distances` of some queries can be from `exact_distances` (b,)."""
    width, longest = gallery.features.shape[1], gallery.length.max()
    sums = 8 * (width + 16) * 2.0**-53 * (query.length[rows] + longest).square()  # of fp64, there and here
    return 2.02 * UNIT * query.length[rows] * longest + sums + 1e-37 * width * gallery.scale.max() * query.scale[rows]


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """On the device of x: no autocast, no TF32, no graph."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with on_device_of(x), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
