"""Plan and pixels to batches, augmented on the device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from dataloading.bad_images import BadImages
from dataloading.config import DataloaderConfig, InputConfig
from dataloading.decode import BICUBIC, BILINEAR, decode
from dataloading.pixels import for_training, from_files
from dataloading.plan import EpochPlan, epoch_plan
from dataloading.records import Record, Split, check_batch
from dataloading.retry import Reader
from kernels.augmentation import augment, normalize


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
        self._reader = Reader(split.train, partial(decode, size=input_cfg.SIZE_TRAIN, resize=BICUBIC), bad_images)
        self._pixels, self.note = for_training(
            [record.path for record in split.train],
            input_cfg.SIZE_TRAIN,
            BICUBIC,
            loader_cfg,
            root=split.root,
            batch_size=batch_size // world_size,
            device=self.device,
            otherwise=self._reader,
        )
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
            for position, instead in self._reader.instead.items():  # nearly always none
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
    """Every record once, in order, resized and normalised; the last batch may be smaller. Can be iterated again.

    The images are decoded each time: an evaluation sees each of them once.
    """

    __test__ = False  # no test class, whatever its name

    def __init__(
        self,
        records: Sequence[Record],
        input_cfg: InputConfig,
        loader_cfg: DataloaderConfig,
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.batch_size, self.device, self.dtype = batch_size, torch.device(device), dtype
        self._input, self._num_records = input_cfg, len(records)
        self._indices = torch.arange(len(records), device=self.device)
        self._persons = torch.tensor([record.person for record in records], dtype=torch.int64).to(self.device)
        self._cameras = torch.tensor([record.camera for record in records], dtype=torch.int64).to(self.device)
        self._pixels = from_files(
            [record.path for record in records],
            input_cfg.SIZE_TEST,
            BILINEAR,
            loader_cfg,
            batch_size=batch_size,
            device=self.device,
            otherwise=Reader(records, partial(decode, size=input_cfg.SIZE_TEST, resize=BILINEAR)),
        )

    def __len__(self) -> int:
        return -(-self._num_records // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return _beside(self._batches(), self.device)

    def _batches(self) -> Iterator[Batch]:
        starts = range(0, self._num_records, self.batch_size)
        slices = [slice(start, min(start + self.batch_size, self._num_records)) for start in starts]
        for (decoded, _), part in zip(self._pixels([np.arange(part.start, part.stop) for part in slices]), slices):
            pixels = decoded.to(self.device, non_blocking=True)
            images = normalize(pixels, self._input.PIXEL_MEAN, self._input.PIXEL_STD, self.dtype)
            yield Batch(images, self._persons[part], self._cameras[part], self._indices[part])

    def close(self) -> None:
        self._pixels.close()


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
