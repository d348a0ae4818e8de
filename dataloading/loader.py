"""Plan and pixels to batches, augmented on the device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.config import DataloaderConfig, InputConfig
from fusionreid.dataloading.decode import BICUBIC, BILINEAR
from fusionreid.dataloading.image_source import Images
from fusionreid.dataloading.plan import EpochPlan, epoch_plan
from fusionreid.dataloading.records import Record, Split, check_batch
from fusionreid.kernels.augmentation import augment, normalize


@dataclass
class Batch:
    images: Tensor  # (B, 3, H, W), channels-last
    persons: Tensor  # (B,) int64: labels in training, the data set's numbers in test
    cameras: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64, which record


class TrainLoader:
    """This rank's part of every batch. One iterator at a time; resident images and workers live until `close`.

    `note` is a line about where the images are.
    """

    def __init__(
        self,
        split: Split,
        input_cfg: InputConfig,
        loader_cfg: DataloaderConfig,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        bad_images: BadImages | None = None,
    ) -> None:
        check_batch(split, batch_size, loader_cfg.NUM_INSTANCE, world_size)
        self.batch_size, self.instances, self.seed = batch_size, loader_cfg.NUM_INSTANCE, seed
        self.rank, self.world_size, self.device, self.dtype = rank, world_size, torch.device(device), dtype
        self._input, self._labels = input_cfg, np.array(split.labels)
        self._cameras = np.array([record.camera for record in split.train])
        images = Images(
            "train", split.train, input_cfg.SIZE_TRAIN, BICUBIC, loader_cfg,
            batch_size=batch_size // world_size, device=self.device, bad_images=bad_images,
        )  # fmt: skip
        self._instead = images.reader.instead
        resident, self.note = images.resident(split.root)
        self._pixels = resident or images.decoded()
        self._plan: tuple[int, EpochPlan] | None = None  # of the last epoch asked for

    def plan(self, epoch: int) -> EpochPlan:
        if self._plan is None or self._plan[0] != epoch:
            plan = epoch_plan(
                self._labels,
                persons_per_batch=self.batch_size // self.instances,
                instances=self.instances,
                seed=self.seed,
                epoch=epoch,
                height=self._input.SIZE_TRAIN[0],
                width=self._input.SIZE_TRAIN[1],
                padding=self._input.PADDING,
                flip_prob=self._input.PROB,
                erase_prob=self._input.RE_PROB,
            )
            self._plan = epoch, plan
        return self._plan[1]

    def steps(self, epoch: int) -> int:
        return self.plan(epoch).num_steps

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        return _beside(self._batches(epoch, start_step), self.device)

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        plan = self.plan(epoch)
        slices = [plan.rank_slice(step, self.rank, self.world_size) for step in range(start_step, plan.num_steps)]
        # The epoch's parameters go to the device at once: a copy per step would wait for the step before.
        index = torch.arange(len(plan.image), device=self.device)
        image, flip, shift, erase, labels, cameras = (
            torch.from_numpy(array).to(self.device)
            for array in (plan.image, plan.flip, plan.shift, plan.erase, self._labels, self._cameras)
        )
        persons, cameras = labels[image], cameras[image]
        pixels = self._pixels([plan.image[part] for part in slices])
        for (decoded, rows), part in zip(pixels, slices):
            for position, instead in self._instead.items():  # nearly always none
                cameras[image == position] = int(self._cameras[instead])
            images = augment(
                decoded.to(self.device, non_blocking=True),
                flip[part],
                shift[part],
                erase[part],
                index[part],
                seed=self.seed,
                epoch=epoch,
                mean=self._input.PIXEL_MEAN,
                std=self._input.PIXEL_STD,
                dtype=self.dtype,
                rows=rows,
            )
            yield Batch(images, persons[part], cameras[part], image[part])

    def close(self) -> None:
        self._pixels.close()


class TestLoader:
    """This rank's share of the records, in order, resized and normalised; can be iterated again.

    All ranks take equally many images, the last ones the last record more than once, because a sharded model computes
    in step; the last batch may be smaller. With `root`, the folder of the data set, the images are resident where there
    is a file of them or, with `fill`, room for one; else they are decoded each time. `note` says which.
    """

    __test__ = False  # no test class, whatever its name

    def __init__(
        self,
        records: Sequence[Record],
        input_cfg: InputConfig,
        loader_cfg: DataloaderConfig,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        root: str = "",
        fill: bool = False,
    ) -> None:
        self.records, self.batch_size = records, batch_size
        self.device, self.dtype, self._input = torch.device(device), dtype, input_cfg
        last, share = len(records) - 1, -(-len(records) // world_size)
        positions = np.minimum(np.arange(rank * share, (rank + 1) * share), last)
        self._positions = np.split(positions, range(batch_size, share, batch_size))
        self._indices = torch.from_numpy(positions).to(self.device)
        persons, cameras = ([getattr(record, what) for record in records] for what in ("person", "camera"))
        self._persons = torch.tensor(persons, dtype=torch.int64).to(self.device)[self._indices]
        self._cameras = torch.tensor(cameras, dtype=torch.int64).to(self.device)[self._indices]
        self._images = Images(
            "test", records, input_cfg.SIZE_TEST, BILINEAR, loader_cfg, batch_size=batch_size, device=self.device
        )
        mine = slice(int(positions[0]), int(positions[-1]) + 1)
        self._resident, self.note = self._images.resident(root, mine, fill=fill) if root else (None, "")

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[Batch]:
        return _beside(self._batches(), self.device)

    def _batches(self) -> Iterator[Batch]:
        pixels = self._resident or self._images.decoded()
        try:
            start = 0
            for decoded, rows in pixels(self._positions):
                given = decoded if rows is None else decoded.index_select(0, rows)
                given = given.to(self.device, non_blocking=True)
                images = normalize(given, self._input.PIXEL_MEAN, self._input.PIXEL_STD, self.dtype)
                part = slice(start, start := start + len(images))
                yield Batch(images, self._persons[part], self._cameras[part], self._indices[part])
        finally:
            if self._resident is None:
                pixels.close()


def _beside(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """On a GPU a stream of its own prepares a batch, while the step before, enqueued already, still computes."""
    if device.type != "cuda":
        yield from batches
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # what was made for all batches
    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
        if batch is None:
            return
        step = torch.cuda.current_stream(device)
        step.wait_stream(stream)
        for tensor in vars(batch).values():
            tensor.record_stream(step)  # else the next batch could be written where this one is still read
        yield batch


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs and evaluations: memory that was of a stream is given out to that stream alone."""
    return torch.cuda.Stream(device)
