"""Tracks as one vector each: the mean of the unit vectors of its images, at unit length."""

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusionreid.dataloading.records import Record
from fusionreid.engine.evaluation.embeddings import Embeddings
from fusionreid.engine.evaluation.finite import ROWS_AT_ONCE


@dataclass(frozen=True, eq=False)
class Tracks(Embeddings):
    """A row per track; its record names the image most like the whole track, and the person and camera of all images.

    A person or camera is -1 where the images of a track do not agree.
    """

    tracks: tuple[str, ...]
    sizes: tuple[int, ...]  # number of images


def tracks_by_folder(images: Embeddings) -> Tracks:
    """Pool images of one folder, and of one person and camera where they are known."""
    folders = [os.path.dirname(record.path) for record in images.records]
    keys = [(folder, record.person, record.camera) for folder, record in zip(folders, images.records)]
    return pool(images, keys, folders)


def pool(images: Embeddings, keys: Sequence[Hashable], names: Sequence[str]) -> Tracks:
    """Pool images of equal key into a track, which has the name of its first image; tracks in order of appearance."""
    number = {key: position for position, key in enumerate(dict.fromkeys(keys))}
    owners = [number[key] for key in keys]
    vectors, likeness = _means(images.features, torch.tensor(owners, dtype=torch.int64), len(number))
    members: list[list[int]] = [[] for _ in number]
    for position, owner in enumerate(owners):
        members[owner].append(position)
    records = []
    for mine in members:
        theirs = [images.records[position] for position in mine]
        shown = theirs[max(range(len(mine)), key=lambda i: likeness[mine[i]])]
        persons, cameras = {record.person for record in theirs}, {record.camera for record in theirs}
        records.append(Record(shown.path, *(found.pop() if len(found) == 1 else -1 for found in (persons, cameras))))
    return Tracks(vectors, tuple(records), 0, images.source, tuple(names[mine[0]] for mine in members),
                  tuple(map(len, members)))  # fmt: skip


def _means(features: Tensor, owners: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """Return the vectors (T, D) of tracks, summed in fp64, and the cosine (N,) of each image to its own."""
    sums = torch.zeros(count, features.shape[1], dtype=torch.float64)
    for rows, mine in zip(features.split(ROWS_AT_ONCE), owners.split(ROWS_AT_ONCE)):
        sums.index_add_(0, mine, F.normalize(rows.double()))
    means = F.normalize(sums)
    cosines = [
        (F.normalize(rows.double()) * means[mine]).sum(1)
        for rows, mine in zip(features.split(ROWS_AT_ONCE), owners.split(ROWS_AT_ONCE))
    ]
    return means.float(), torch.cat(cosines).tolist()
