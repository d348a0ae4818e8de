"""Exact squared Euclidean distances, and two faster products with proven error bounds that settle most pairs.

Three grades: an fp32 matrix product of all pairs (`fast_distances`), fp32 products summed in fp64 for chosen pairs
(`close_distances`), and fp64 throughout (`exact_distances`). "Exact" is the fp64 sum over the coordinates of (q - g)^2:
a function of the two rows alone, so that equal rows are equally far, to the last bit. With normalize, rows are brought
to unit length first; the square is then 2 - 2 cosine.

The bound: a sum of n rounded products in any order errs by at most n u / (1 - n u) times the sum of their magnitudes
(u = 2^-24; Higham, Accuracy and Stability, section 3.1), and that sum is at most |q| |g|. A product over all D columns
would make n = D; ours adds up products of CHUNK columns in groups, so n is about CHUNK + 2 sqrt(D / CHUNK).
N rows, D width, b queries in a block, P pairs.
"""

import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusionreid.kernels._path import on_device_of, use_triton

CHUNK = 128  # columns per product
CLOSE_ELEMENTS = 2**19  # of one batch of fp32 products
FETCHED = 2**13  # pairs whose rows are brought to the device at once
UNIT = 2.0**-24


EXACT_ROWS, EXACT_ELEMENTS = 1024, 2**20  # most of one fp64 batch: it stays in a processor's cache
LONGEST = 1e18  # of a row: its square is still an fp32 number


class Rows:
    """A matrix of features (N, D) and the length of every row; the features may lie elsewhere than on the device that
    computes: in memory or, behind a memory map, on disk."""

    def __init__(self, name: str, features: Tensor, normalize: bool, device: torch.device | None = None) -> None:
        if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
            raise ValueError(f"{name} must be floating (N, D), neither of them 0, got {tuple(features.shape)}")
        self.features = features.contiguous() if use_triton(features) else features
        self.batch = max(1, min(EXACT_ROWS, EXACT_ELEMENTS // features.shape[1]))
        length = lengths(self.features, self.batch).to(device or features.device)
        bad = (~(length < LONGEST)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name}: {len(bad)} of {len(features)} rows are not finite or too long, first {bad[:5]}")
        self.normalized = normalize
        self.scale = 1 / length.clamp_min(1e-12) if normalize else torch.ones_like(length)
        self.length = length * self.scale
        self.elsewhere = features.device != length.device

    @classmethod
    def both(cls, query: Tensor, gallery: Tensor, normalize: bool) -> tuple["Rows", "Rows"]:
        if query.shape[1:] != gallery.shape[1:] or query.dtype != gallery.dtype:
            raise ValueError(
                f"query and gallery must be features of one model, equally wide and of one type, "
                f"got {tuple(query.shape)} {query.dtype} and {tuple(gallery.shape)} {gallery.dtype}"
            )
        if gallery.device.type != "cpu" and gallery.device != query.device:
            raise ValueError(
                f"a gallery on a GPU needs its queries there, got a gallery on {gallery.device} and queries on "
                f"{query.device}: move the queries, or leave the gallery on the CPU, to be brought span by span"
            )
        items = cls("gallery", gallery, normalize, query.device)
        return items if query is gallery else cls("query", query, normalize), items

    def __len__(self) -> int:
        return len(self.features)

    def part(self, rows: slice | Tensor, features: Tensor) -> "Rows":
        """Some rows, with their features on the device."""
        some = copy(self)
        some.features, some.scale, some.length, some.elsewhere = features, self.scale[rows], self.length[rows], False
        return some

    def spans(self, size: int) -> Iterator[tuple[int, "Rows"]]:
        """Consecutive parts and where each starts; from elsewhere, the next one comes while one is used."""
        blocks = [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]
        if not self.elsewhere:
            yield from ((block.start, self.part(block, self.features[block])) for block in blocks)
            return
        bring = _bringer(self.features, self.scale.device, min(size, len(self)))
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(bring, blocks[0])
            for block, following in zip(blocks, [*blocks[1:], None]):
                features = coming.result()
                if following:
                    coming = pool.submit(bring, following)
                if features.is_cuda:
                    features.record_stream(torch.cuda.current_stream(features.device))
                yield block.start, self.part(block, features)


def _bringer(features: Tensor, device: torch.device, most: int) -> Callable[[slice], Tensor]:
    """A function that brings up to `most` rows to the device: to a GPU by pinned memory and a stream of its own."""
    if device.type != "cuda":
        return lambda block: features[block].to(device)
    pinned = torch.empty(most, features.shape[1], dtype=features.dtype, pin_memory=True)
    stream = torch.cuda.Stream(device)

    def bring(block: slice) -> Tensor:
        rows = pinned[: block.stop - block.start].copy_(features[block])
        with torch.cuda.stream(stream):
            moved = rows.to(device, non_blocking=True)
        stream.synchronize()
        return moved

    return bring


def lengths(features: Tensor, batch: int) -> Tensor:
    """Of every row (N,) in fp64."""
    length = torch.empty(len(features), dtype=torch.float64, device=features.device)
    if use_triton(features):
        lengths_kernel[(triton.cdiv(len(features), 16),)](features, length, *features.shape, ROWS=16, BLOCK=128)
        return length
    size = min(batch, len(features))
    rows = torch.empty(size, features.shape[1], dtype=torch.float64, device=features.device)
    for start in range(0, len(features), size):
        block = slice(min(start, len(features) - size), min(start + size, len(features)))
        length[block] = rows.copy_(features[block]).square_().sum(1).sqrt()  # `size` rows: equal rows, equal lengths
    return length


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
            distances_kernel[(triton.cdiv(len(q), 16),)](
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
    memory, columns = query.new_empty(3, len(query) * min(size, len(gallery))), chunks(query)
    for start in range(0, len(gallery), size):
        block = slice(start, min(start + size, len(gallery)))
        yield block, fast_tile(columns, gallery, block, memory)


def chunks(query: Tensor) -> list[Tensor]:
    """Cut queries (b, D) into contiguous chunks of their columns, (b, CHUNK) each but for the last."""
    return [columns.contiguous() for columns in query.split(CHUNK, 1)]


def fast_tile(query: Sequence[Tensor], gallery: Rows, block: slice, memory: Tensor) -> Tensor:
    """`fast_distances` of queries in `chunks` and one block of the gallery (b, block), in the caller's memory (3, at
    least that many)."""
    total, part, chunk = memory[:, : len(query[0]) * (block.stop - block.start)].view(3, len(query[0]), -1)
    rows, group = gallery.features[block].to(memory.device).float(), _chunks_per_group(gallery.features.shape[1])
    pairs = list(zip(query, rows.split(CHUNK, 1), strict=True))
    for first in range(0, len(pairs), group):
        summed = _product(*pairs[first], part if first else total)
        for pair in pairs[first + 1 : first + group]:
            summed += _product(*pair, chunk)
        total = total.add_(summed) if first else summed
    square, scale = gallery.length[block].square().float(), gallery.scale[block].float()
    return torch.addcmul(square, total, scale, value=-2, out=total)


def _product(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """x (b, K) times y (n, K) transposed (b, n) in fp32, written to `out` unless oneDNN computes it."""
    if x.is_cuda or not _onednn_is_exact():
        return torch.mm(x, y.T, out=out)
    return torch.ops.mkldnn._linear_pointwise(x, y.contiguous(), None, "none", [], "")


@cache
def _onednn_is_exact() -> bool:
    """Whether oneDNN multiplies in fp32. Where it may, it is twice as fast as MKL on processors not made by Intel."""
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    lowered = any(f"{prefix}_DEFAULT_FPMATH_MODE" in os.environ for prefix in ("ONEDNN", "DNNL"))
    return has and platform.machine().lower() in ("x86_64", "amd64") and not lowered


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


@triton.jit
def lengths_kernel(x_ptr, length_ptr, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """sqrt(sum_d x[row, d]^2) in fp64."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in tl.range(0, D, BLOCK):
        x = load_columns(x_ptr, row, row < N, first, D, BLOCK)
        total += x * x
    tl.store(length_ptr + row, tl.sqrt(tl.sum(total, 1)), mask=row < N)


@triton.jit
def distances_kernel(
    x_ptr, y_ptr, x_scale_ptr, y_scale_ptr, x_rows_ptr, y_rows_ptr, distance_ptr, P, D,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_d (x - y)^2 of pairs of scaled rows in fp64; the order of the sum depends on D alone."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    within = pair < P
    x_row, y_row = tl.load(x_rows_ptr + pair, mask=within, other=0), tl.load(y_rows_ptr + pair, mask=within, other=0)
    x_scale, y_scale = tl.load(x_scale_ptr + x_row)[:, None], tl.load(y_scale_ptr + y_row)[:, None]
    total = tl.zeros((PAIRS, BLOCK), tl.float64)
    for first in tl.range(0, D, BLOCK):
        x, y = load_columns(x_ptr, x_row, within, first, D, BLOCK), load_columns(y_ptr, y_row, within, first, D, BLOCK)
        difference = x * x_scale - y * y_scale
        total += difference * difference
    tl.store(distance_ptr + pair, tl.sum(total, 1), mask=within)


@triton.jit
def load_columns(x_ptr, row, within, first, D, BLOCK: tl.constexpr):
    """Columns first..first + BLOCK of some rows in fp64, [rows, BLOCK]."""
    d = first + tl.arange(0, BLOCK)
    return tl.load(x_ptr + row[:, None] * D + d, mask=within[:, None] & (d < D), other=0.0).to(tl.float64)
