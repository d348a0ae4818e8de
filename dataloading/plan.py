"""Plan of an epoch: which image stands where, and how it is augmented; a pure function of (seed, epoch, position).

A batch is P persons x K images. A person's images are shuffled and cut into groups of K (a rest below K is left out;
fewer than K in all: K drawn with replacement). Each batch takes the next group of P persons drawn from those that have
groups left, until fewer than P have. Source: Hermans et al., arXiv:1703.07737; Luo et al., arXiv:1903.07071.
Of S balanced data sets each fills P / S places of every batch so, and starts anew as often as it takes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusionreid.dataloading.records import DataError
from fusionreid.kernels.philox import AUGMENTATION, SAMPLING, Words, below, philox, uniform

COUNTED = 200_000  # groups of images, to know how many steps a training takes
SHUFFLE, REPLACEMENT, PERSONS = range(KINDS := 3)  # what a sampling counter's third word says the bits are for
ERASED_AREA = (0.02, 1 / 3)  # of the image
ERASED_ASPECT = (0.3, 1 / 0.3)  # height over width, log-uniform
ERASING_TRIES = 10


@dataclass(frozen=True)
class EpochPlan:
    """Arrays over the L = num_steps x batch_size positions of an epoch."""

    image: np.ndarray  # (L,) int64, which record
    flip: np.ndarray  # (L,) bool
    shift: np.ndarray  # (L, 2) int64, (dy, dx): the source is row y + dy, column x + dx, black outside
    erase: np.ndarray  # (L, 4) int32, (top, left, height, width); height 0: none
    persons_per_batch: int
    instances: int

    @property
    def batch_size(self) -> int:
        """Images per batch, over all ranks."""
        return self.persons_per_batch * self.instances

    @property
    def num_steps(self) -> int:
        """Batches per epoch."""
        return len(self.image) // self.batch_size

    def rank_slice(self, step: int, rank: int, world_size: int) -> slice:
        """Return the positions of one rank in one step: a contiguous part of the batch, whole persons."""
        if self.persons_per_batch % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"rank_slice: {self.persons_per_batch} persons per batch must divide among the ranks, got rank {rank} "
                f"of {world_size}"
            )
        if not 0 <= step < self.num_steps:
            raise IndexError(f"rank_slice: step must lie in 0..{self.num_steps - 1}, got {step}")
        share = self.batch_size // world_size
        start = step * self.batch_size + rank * share
        return slice(start, start + share)


def epoch_plan(
    labels: Sequence[int] | np.ndarray,
    *,
    persons_per_batch: int,
    instances: int,
    seed: int,
    epoch: int,
    height: int,
    width: int,
    padding: int = 10,
    flip_prob: float = 0.5,
    erase_prob: float = 0.5,
    sets: np.ndarray | None = None,
) -> EpochPlan:
    """Plan an epoch for records with these labels, 0..persons-1 each at least once; height and width in pixels.

    `sets` (N,) are the data sets to balance, 0, 1, ... in the order of the labels; S must divide the persons.
    """
    key, labels = (seed, epoch), np.asarray(labels, np.int64)
    if sets is None:
        image = _sample(labels, persons_per_batch, instances, key)
    else:
        image = _balanced(labels, sets, persons_per_batch, instances, key)
    position = torch.arange(len(image))
    words = philox(key, (position, 0, 0, AUGMENTATION))
    shift = torch.stack((below(words[1], 2 * padding + 1), below(words[2], 2 * padding + 1)), dim=1) - padding
    erase = _rectangles(key, position, height, width)
    erase[uniform(words[3]) >= erase_prob] = 0
    return EpochPlan(
        image=image,
        flip=(uniform(words[0]) < flip_prob).numpy(),
        shift=shift.numpy(),
        erase=erase.int().numpy(),
        persons_per_batch=persons_per_batch,
        instances=instances,
    )


def _balanced(
    labels: np.ndarray, sets: np.ndarray, persons_per_batch: int, instances: int, key: tuple[int, int]
) -> np.ndarray:
    """Draw as `_sample`, for about as many images as there are, the persons of a batch from each set in turn."""
    number = int(sets[-1]) + 1
    steps = int(np.maximum(np.bincount(labels) // instances, 1).sum()) // persons_per_batch
    drawn = []
    for one in range(number):
        records, images, passes = np.flatnonzero(sets == one), np.empty(0, np.int64), 0
        own, share = labels[records] - labels[records].min(), persons_per_batch // number
        while len(images) < steps * share * instances:
            again = _sample(own, share, instances, key, 1 + one + number * passes)
            images, passes = np.concatenate([images, records[again]]), passes + 1
        drawn.append(images[: steps * share * instances].reshape(steps, share, instances))
    return np.stack(drawn, axis=2).reshape(-1)


def _sample(
    labels: np.ndarray, persons_per_batch: int, instances: int, key: tuple[int, int], stream: int = 0
) -> np.ndarray:
    """Draw the record at every position, (L,) int64; of each `stream` independently."""
    counts = np.bincount(labels)
    if len(counts) < persons_per_batch or not counts.all():
        raise DataError(
            f"a batch of {persons_per_batch} persons needs as many persons with images, got {np.count_nonzero(counts)} "
            f"persons for {len(counts)} labels"
        )
    groups, first_group = _groups(labels, counts, instances, key, stream)
    taken = [0] * len(counts)
    chosen: list[int] = []  # groups
    for batch in _persons_of_batches(np.maximum(counts // instances, 1), persons_per_batch, key, stream):
        for person in batch:
            chosen.append(first_group[person] + taken[person])
            taken[person] += 1
    return groups[chosen].reshape(-1)


def _persons_of_batches(
    num_groups: np.ndarray, persons_per_batch: int, key: tuple[int, int], stream: int = 0
) -> Iterator[list[int]]:
    """Yield the persons of every batch, drawn from those with groups left; `num_groups` is how many each has."""
    steps = int(num_groups.sum()) // persons_per_batch  # never more
    step, place = torch.arange(steps)[:, None], torch.arange(persons_per_batch)
    ready, left = list(range(len(num_groups))), num_groups.tolist()
    for words in philox(key, (step, place, PERSONS + KINDS * stream, SAMPLING))[0].tolist():
        if len(ready) < persons_per_batch:
            break
        for place, bits in enumerate(words, 1):  # P of the persons ready, drawn to the end of the list
            among = len(ready) - place + 1
            pick = bits * among >> 32
            ready[pick], ready[-place] = ready[-place], ready[pick]
        batch = ready[-persons_per_batch:]
        del ready[-persons_per_batch:]
        yield batch
        for person in batch:
            left[person] -= 1
        ready += [person for person in batch if left[person]]


def total_steps(
    labels: Sequence[int] | np.ndarray, *, persons_per_batch: int, instances: int, seed: int, epochs: int
) -> int:
    """Count the steps of epochs 1, 2, ...; of many large ones by the mean of the first.

    Epochs differ: in a small set by a good part of their steps.
    """
    num_groups = np.maximum(np.bincount(np.asarray(labels, np.int64)) // instances, 1)
    counted = min(epochs, max(1, COUNTED // int(num_groups.sum())))
    steps = sum(
        1 for epoch in range(1, counted + 1) for _ in _persons_of_batches(num_groups, persons_per_batch, (seed, epoch))
    )
    return round(steps * epochs / counted)


def _groups(
    labels: np.ndarray, counts: np.ndarray, instances: int, key: tuple[int, int], stream: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut into groups of K records, (groups, K) int64, person after person; also the first group of every person."""
    order = philox(key, (torch.arange(len(labels)), 0, SHUFFLE + KINDS * stream, SAMPLING))[0].numpy()
    shuffled = np.lexsort((order, labels))  # by person, then at random
    start = np.cumsum(counts) - counts  # of each person within `shuffled`
    num_groups = np.maximum(counts // instances, 1)
    first_group = np.cumsum(num_groups) - num_groups
    person = np.repeat(np.arange(len(counts)), num_groups)
    number = np.arange(len(person)) - first_group[person]  # of a group among its person's
    member = number[:, None] * instances + np.arange(instances)  # place among the person's images
    scarce = np.flatnonzero(counts < instances)
    words = philox(
        key, (torch.from_numpy(scarce)[:, None], torch.arange(instances), REPLACEMENT + KINDS * stream, SAMPLING)
    )
    member[first_group[scarce]] = below(words[0], torch.from_numpy(counts[scarce])[:, None]).numpy()
    return shuffled[start[person][:, None] + member], first_group


def _rectangles(key: tuple[int, int], position: Tensor, height: int, width: int) -> Tensor:
    """Find per position the first of ten random rectangles that fits into the image, (L, 4) int64, else zeros."""
    tries = torch.arange(1, ERASING_TRIES + 1)
    tops, lefts, heights, widths = rectangle(philox(key, (position[:, None], tries, 0, AUGMENTATION)), height, width)
    fits = (heights < height) & (widths < width)  # (L, tries)
    first = fits.byte().argmax(dim=1, keepdim=True)
    found = torch.cat([side.gather(1, first) for side in (tops, lefts, heights, widths)], dim=1)
    return torch.where(fits.gather(1, first), found, 0)


def rectangle(words: Words, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute top, left, height, width from random bits; the rectangle may not fit into the image."""
    area, aspect = uniform(words[0]).double(), uniform(words[1]).double()
    area = (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area) * (height * width)
    low, high = np.log(ERASED_ASPECT)
    aspect = torch.exp(low + (high - low) * aspect)
    rows, cols = torch.sqrt(area * aspect).round().long(), torch.sqrt(area / aspect).round().long()
    top, left = below(words[2], (height - rows + 1).clamp(min=1)), below(words[3], (width - cols + 1).clamp(min=1))
    return top, left, rows, cols
