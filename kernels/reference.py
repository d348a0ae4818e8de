"""Every op in plain torch, any dtype, no tricks: what the tests hold the fast versions against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusionreid.kernels.neighbours import Neighbours
from fusionreid.kernels.philox import ERASING_NOISE
from fusionreid.kernels.ranking import RankCounts
from fusionreid.kernels.triplet import BatchHard

if TYPE_CHECKING:
    from fusionreid.kernels.class_attention import ClassStream


def augment(
    images: Tensor,
    flip: Tensor,
    shift: Tensor,
    erase: Tensor,
    index: Tensor,
    *,
    seed: int,
    epoch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    rows: Tensor | None = None,
) -> Tensor:
    height, width = images.shape[1:3]
    out = []
    for image, mirrored, (dy, dx), (top, left, rows_, cols), position in zip(
        images if rows is None else images[rows], flip, shift, erase.tolist(), index
    ):
        canvas = image.new_zeros(3 * height, 3 * width, 3)
        canvas[height : 2 * height, width : 2 * width] = image.flip(1) if mirrored else image
        seen = canvas[height + dy : 2 * height + dy, width + dx : 2 * width + dx].double()
        values = ((seen / 255 - torch.tensor(mean)) / torch.tensor(std)).flatten(1)
        first, last = 3 * left // 16, (3 * (left + cols) + 15) // 16  # blocks of noise in a row of the rectangle
        for row in range(rows_):
            counter = [row * (last - first), int(position), 0, ERASING_NOISE]
            words = np.random.Philox(key=seed | epoch << 32, counter=counter).random_raw(4 * (last - first))
            levels = torch.from_numpy(words.view(np.uint16).astype(np.float64)).to(values.device)
            noise = torch.special.ndtri((levels + 0.5) / 65536)
            start = 3 * left - 16 * first
            values[top + row, 3 * left : 3 * (left + cols)] = noise[start : start + 3 * cols]
        out.append(values.unflatten(1, (width, 3)))
    return torch.stack(out).permute(0, 3, 1, 2).to(dtype)


def batch_hard_triplet(
    features: Sequence[Tensor], persons: Tensor, *, margin: float | None = None, normalize: bool = False
) -> BatchHard:
    """The whole distance matrix of every head, differentiated densely, as published."""
    same = persons[:, None] == persons
    valid = (same.sum(1) > 1) & ~same.all(1)
    heads = []
    for x in features:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if normalize:
            x = x / (x.norm(dim=1, keepdim=True) + 1e-12)
        squares = x.square().sum(1)
        distance = (squares[:, None] + squares - 2 * x @ x.T).clamp_min(1e-12).sqrt()
        positive, p = distance.masked_fill(~same, -torch.inf).max(1)
        negative, n = distance.masked_fill(same, torch.inf).min(1)
        negative = torch.where(torch.isinf(negative), 0, negative)
        gap = positive - negative
        loss = F.softplus(gap, threshold=100) if margin is None else (gap + margin).clamp_min(0)
        heads.append((torch.where(valid, loss, 0).sum() / valid.sum().clamp_min(1), positive, negative, p, n))
    losses, to_positive, to_negative, positive, negative = (torch.stack(columns) for columns in zip(*heads))
    return BatchHard(losses, to_positive, to_negative, positive, negative, valid)


def dual_cross_attention(
    a: ClassStream, b: ClassStream | None = None, scale: float | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    def attend(stream: ClassStream) -> Tensor:
        values = F.linear(stream.tokens, stream.value_weight).unflatten(-1, stream.query.shape[1:])  # (B, N, H, D)
        return (class_attention_weights(stream, scale)[..., None] * values).sum(1).flatten(1)

    return attend(a) if b is None else (attend(a), attend(b))


def class_attention_weights(stream: ClassStream, scale: float | None = None) -> Tensor:
    """(B, N, H): how the class token spreads its attention over the tokens, which the op itself never holds."""
    _, heads, head_width = stream.query.shape
    keys = F.layer_norm(stream.tokens, stream.norm_weight.shape, stream.norm_weight, stream.norm_bias, stream.norm_eps)
    keys = F.linear(keys, stream.key_weight).unflatten(-1, (heads, head_width))  # (B, N, H, D)
    scores = (stream.query[:, None] * keys).sum(-1) * (head_width**-0.5 if scale is None else scale)
    return scores.softmax(1)


def dual_self_attention(
    qkv_a: Tensor, qkv_b: Tensor | None = None, scale: float | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    def attend(qkv: Tensor) -> Tensor:
        query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))  # (B, H, N, D)
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    return attend(qkv_a) if qkv_b is None else (attend(qkv_a), attend(qkv_b))


def nearest_neighbours(query: Tensor, gallery: Tensor, k: int, *, normalize: bool = False) -> Neighbours:
    distances = torch.stack([_squared_distances(q, gallery, normalize) for q in query])
    values, indices = distances.sort(dim=1, stable=True)
    return Neighbours(values[:, :k], indices[:, :k], values[:, -1])


def rank_counts(
    query: Tensor,
    gallery: Tensor,
    query_persons: Tensor,
    gallery_persons: Tensor,
    query_cameras: Tensor,
    gallery_cameras: Tensor,
    *,
    normalize: bool = False,
) -> RankCounts:
    distances = torch.stack([_squared_distances(q, gallery, normalize) for q in query])
    return rank_counts_of(distances, query_persons, gallery_persons, query_cameras, gallery_cameras)


def rank_counts_of(
    distances: Tensor, query_persons: Tensor, gallery_persons: Tensor, query_cameras: Tensor, gallery_cameras: Tensor
) -> RankCounts:
    ranks = []
    for order, person, camera in zip(distances.argsort(dim=1, stable=True), query_persons, query_cameras):
        valid = order[(gallery_persons[order] != person) | (gallery_cameras[order] != camera)]
        ranks.append((gallery_persons[valid] == person).nonzero().flatten() + 1)
    offsets = torch.tensor([0, *(len(r) for r in ranks)]).cumsum(0)
    return RankCounts(torch.cat(ranks), offsets, distances.numel())


def smoothed_cross_entropy(logits: Sequence[Tensor], persons: Tensor, smoothing: float = 0.1) -> Tensor:
    """Against the whole array of soft targets."""
    losses = []
    for z in logits:
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        targets = F.one_hot(persons, z.shape[1]) * (1 - smoothing) + smoothing / z.shape[1]
        losses.append(-(targets * z.log_softmax(1)).sum(1).mean())
    return torch.stack(losses)


def _squared_distances(query: Tensor, gallery: Tensor, normalize: bool) -> Tensor:
    rows = torch.cat([query[None], gallery]).double()
    if normalize:
        rows = rows * (1 / rows.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12))
    return (rows[1:] - rows[0]).square().sum(1)
