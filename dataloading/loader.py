"""Loaders: plan and pixels to batches, augmented on the device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.config import DataloaderConfig, InputConfig
from fusionreid.dataloading.decode import BICUBIC, BILINEAR
from fusionreid.dataloading.image_source import ImageSet
from fusionreid.dataloading.plan import EpochPlan, epoch_plan, total_steps
from fusionreid.dataloading.records import Record, Split, check_batch
from fusionreid.kernels.augmentation import augment, erase_rectangles, normalize


@dataclass
class Batch:
    """Images of a step with what is known of them."""

    images: Tensor  # (B, 3, H, W), channels-last
    persons: Tensor  # (B,) int64: labels in training, the data set's numbers in test
    cameras: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64, which record


class TrainLoader:
    """Loads this rank's part of every training batch; one iterator at a time.

    Cached images and workers live until `close`. `note` is a line about where the images are.
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
        bad_images: BadImages | None = None,
    ) -> None:
        balance = loader_cfg.BALANCE_SETS and len(split.sets) > 1
        check_batch(split, batch_size, loader_cfg.NUM_INSTANCE, world_size, balance=balance)
        self.batch_size, self.instances, self.seed = batch_size, loader_cfg.NUM_INSTANCE, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self._input, self._labels = input_cfg, np.array(split.labels)
        self._cameras = np.array([record.camera for record in split.train])
        self._sets = np.repeat(np.arange(len(split.sets)), [len(one.train) for one in split.sets]) if balance else None
        images = ImageSet(
            "train",
            split.train,
            input_cfg.SIZE_TRAIN,
            BICUBIC,
            loader_cfg,
            batch_size=batch_size // world_size,
            device=self.device,
            bad_images=bad_images,
        )
        self._paths, self._replacements = images.paths, images.reader.replacements
        one = split.sets[0] if len(split.sets) == 1 else split
        cached, self.note = images.cached(one.root, prefix="+".join(each.label for each in one.sets))
        self._dali = None if cached else images.augmented_by_dali(input_cfg.PIXEL_MEAN, input_cfg.PIXEL_STD)
        self._source = cached or self._dali or images.from_files()
        self._plan: tuple[int, EpochPlan] | None = None  # of the last epoch asked for

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of an epoch, the same on all ranks."""
        if self._plan is None or self._plan[0] != epoch:
            plan = epoch_plan(
                self._labels,
                persons_per_batch=self.batch_size // self.instances,
                instances=self.instances,
                sets=self._sets,
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
        """Return the number of batches of an epoch."""
        return self.plan(epoch).num_steps

    def total_steps(self, epochs: int) -> int:
        """Return the number of batches of the first epochs, exact unless there are very many."""
        persons = self.batch_size // self.instances
        if self._sets is not None:  # all epochs are equally long
            return epochs * self.steps(1)
        return total_steps(
            self._labels, persons_per_batch=persons, instances=self.instances, seed=self.seed, epochs=epochs
        )

    def paths(self, epoch: int, step: int) -> list[str]:
        """Return the images of a step, those of all ranks."""
        images = self.plan(epoch).image[step * self.batch_size : (step + 1) * self.batch_size]
        return [self._paths[i] for i in images]

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from a step on."""
        return _prefetch(self._batches(epoch, start_step), self.device)

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
        augmented: Iterator[Tensor]
        if self._dali:
            inputs = [(plan.image[part], plan.flip[part], plan.shift[part]) for part in slices]
            augmented = (
                erase_rectangles(images, erase[part], index[part], seed=self.seed, epoch=epoch)
                for images, part in zip(self._dali.augmented(inputs), slices)
            )
        else:
            augmented = self._augmented(epoch, plan, slices, (flip, shift, erase, index))
        for images, part in zip(augmented, slices):
            for position, replacement in self._replacements.items():  # nearly always none
                cameras[image == position] = int(self._cameras[replacement])
            yield Batch(images, persons[part], cameras[part], image[part])

    def _augmented(
        self, epoch: int, plan: EpochPlan, slices: Sequence[slice], parameters: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        for (decoded, rows), part in zip(self._source([plan.image[part] for part in slices]), slices):
            yield augment(
                decoded.to(self.device, non_blocking=True),
                *(values[part] for values in parameters),
                seed=self.seed,
                epoch=epoch,
                mean=self._input.PIXEL_MEAN,
                std=self._input.PIXEL_STD,
                rows=rows,
            )

    def close(self) -> None:
        """End the workers and free the cached images."""
        self._source.close()


class TestLoader:
    """Loads this rank's share of the records in order, resized and normalised; can be iterated again.

    All ranks take equally many images, because a sharded model computes in step: the last ones repeat the last record.
    The last batch may be smaller. With `root`, the folder of the data set, the images come from the cache if there is
    one or, with `fill`, room for one; else they are decoded at every use. `note` says which.
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
        root: str = "",
        fill: bool = False,
    ) -> None:
        self.records, self.batch_size = records, batch_size
        self.device, self._input = torch.device(device), input_cfg
        last, share = len(records) - 1, -(-len(records) // world_size)
        positions = np.minimum(np.arange(rank * share, (rank + 1) * share), last)
        self._positions = np.split(positions, range(batch_size, share, batch_size))
        self._indices = torch.from_numpy(positions).to(self.device)
        persons, cameras = ([getattr(record, what) for record in records] for what in ("person", "camera"))
        self._persons = torch.tensor(persons, dtype=torch.int64).to(self.device)[self._indices]
        self._cameras = torch.tensor(cameras, dtype=torch.int64).to(self.device)[self._indices]
        self._images = ImageSet(
            "test", records, input_cfg.SIZE_TEST, BILINEAR, loader_cfg, batch_size=batch_size, device=self.device
        )
        mine = slice(int(positions[0]), int(positions[-1]) + 1)
        self._cached, self.note = self._images.cached(root, mine, fill=fill) if root else (None, "")

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[Batch]:
        return _prefetch(self._batches(), self.device)

    def _batches(self) -> Iterator[Batch]:
        source = self._cached or self._images.from_files()
        try:
            start = 0
            for decoded, rows in source(self._positions):
                given = decoded if rows is None else decoded.index_select(0, rows)
                given = given.to(self.device, non_blocking=True)
                images = normalize(given, self._input.PIXEL_MEAN, self._input.PIXEL_STD)
                part = slice(start, start := start + len(images))
                yield Batch(images, self._persons[part], self._cameras[part], self._indices[part])
        finally:
            if self._cached is None:
                source.close()


def _prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Prepare the next batch on a side stream of the GPU while the current step runs."""
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
    """Return the side stream, one for all epochs and evaluations: memory freed on a stream is reused on it alone."""
    return torch.cuda.Stream(device)
