"""Rows of features with their lengths, wherever the features lie. N rows, D width."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy

import torch
import triton
from torch import Tensor

from fusionreid.kernels import ranking_kernels
from fusionreid.kernels._path import use_triton

EXACT_ROWS, EXACT_ELEMENTS = 1024, 2**18  # most of one fp64 batch: it stays in a core's cache
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
        ranking_kernels.lengths[(triton.cdiv(len(features), 16),)](
            features, length, *features.shape, ROWS=16, BLOCK=128
        )
        return length
    size = min(batch, len(features))
    rows = torch.empty(size, features.shape[1], dtype=torch.float64, device=features.device)
    for start in range(0, len(features), size):
        block = slice(min(start, len(features) - size), min(start + size, len(features)))
        length[block] = rows.copy_(features[block]).square_().sum(1).sqrt()  # `size` rows: equal rows, equal lengths
    return length
