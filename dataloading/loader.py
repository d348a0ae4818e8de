"""Plan and pixels to batches: worker processes decode and resize, the main process augments on the device."""

import atexit
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert
from torchvision.transforms import InterpolationMode

from dataloading.config import DataloaderConfig, InputConfig
from dataloading.decode import BICUBIC, BILINEAR, decode_batch
from dataloading.plan import EpochPlan, epoch_plan
from dataloading.records import DataError, Record, Split, check_batch
from dataloading.worker import fork_server, initialize
from kernels.augmentation import augment, normalize

BATCHES_AHEAD = 2  # per worker; also the size of shared memory in use, 12.6 MB per batch of 128


@dataclass
class Batch:
    images: Tensor  # (B, 3, H, W), channels-last
    persons: Tensor  # (B,) int64: labels in training, the data set's numbers in test
    cameras: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64, which record


class _Files(Dataset[Tensor]):
    """What a worker needs to know. A bad file comes back as a value: raised there, it would arrive with a traceback."""

    def __init__(self, records: Sequence[Record], size: tuple[int, int], interpolation: InterpolationMode) -> None:
        self.paths = [record.path for record in records]
        self.size, self.interpolation = size, interpolation

    def __getitems__(self, indices: list[int]) -> Tensor | DataError:
        try:
            return decode_batch([self.paths[i] for i in indices], self.size, self.interpolation)
        except DataError as error:
            return error


class _Pixels:
    """Batches of decoded files, in order; the same workers serve every call until `close` or deletion."""

    def __init__(self, files: _Files, num_workers: int, device: torch.device) -> None:
        self._batches: list[list[int]] = []  # read by the DataLoader whenever it is iterated anew
        self._loader = DataLoader(
            files,
            batch_sampler=self._batches,
            num_workers=num_workers,
            collate_fn=default_convert,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
            prefetch_factor=BATCHES_AHEAD if num_workers else None,
            multiprocessing_context=fork_server() if num_workers else None,
            worker_init_fn=initialize,
            generator=torch.Generator(),  # the default one belongs to the model: a resume must find it untouched
        )
        self._end: weakref.finalize | None = None
        self._closed = False

    def __call__(self, batches: list[list[int]]) -> Iterator[Tensor]:
        """(B, H, W, 3) uint8 each; the next call ends this one."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        self._batches[:] = batches
        try:
            pixels: Any = iter(self._loader)
            if self._end is None and self._loader.num_workers:
                # For when this is dropped, and for the exit, which else would send SIGTERM and wait for ever.
                self._end = weakref.finalize(self, pixels._shutdown_workers)
                atexit.register(self._end)
            for decoded in pixels:
                if isinstance(decoded, DataError):
                    raise decoded
                yield decoded
        except (OSError, EOFError) as error:  # the pipe to a worker broke
            raise RuntimeError("a decoding worker has ended; was it killed, or is memory short?") from error

    def close(self) -> None:
        self._closed = True
        if self._end is not None:
            self._end()


class TrainLoader:
    """This rank's part of every batch. One iterator at a time; workers live until `close`."""

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
    ) -> None:
        check_batch(split, batch_size, loader_cfg.NUM_INSTANCE, world_size)
        self.batch_size, self.instances, self.seed = batch_size, loader_cfg.NUM_INSTANCE, seed
        self.rank, self.world_size, self.device, self.dtype = rank, world_size, torch.device(device), dtype
        self._input, self._labels = input_cfg, np.array(split.labels)
        self._cameras = np.array([record.camera for record in split.train])
        files = _Files(split.train, input_cfg.SIZE_TRAIN, BICUBIC)
        self._pixels = _Pixels(files, loader_cfg.NUM_WORKERS, self.device)
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
        plan = self.plan(epoch)
        slices = [plan.rank_slice(step, self.rank, self.world_size) for step in range(start_step, plan.num_steps)]
        # The epoch's parameters go to the device at once: a copy per step would wait for the step before.
        index = torch.arange(len(plan.image), device=self.device)
        image, flip, shift, erase, labels, cameras = (
            torch.from_numpy(array).to(self.device)
            for array in (plan.image, plan.flip, plan.shift, plan.erase, self._labels, self._cameras)
        )
        persons, cameras = labels[image], cameras[image]
        pixels = self._pixels([plan.image[part].tolist() for part in slices])
        for decoded, part in zip(pixels, slices):
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
            )
            yield Batch(images, persons[part], cameras[part], image[part])

    def close(self) -> None:
        self._pixels.close()


class TestLoader:
    """Every record once, in order, resized and normalised; the last batch may be smaller. Can be iterated again."""

    __test__ = False  # no test class, whatever its name

    def __init__(
        self,
        records: Sequence[Record],
        input_cfg: InputConfig,
        *,
        batch_size: int,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.batch_size, self.device, self.dtype = batch_size, torch.device(device), dtype
        self._input, self._num_records = input_cfg, len(records)
        self._indices = torch.arange(len(records), device=self.device)
        self._persons = torch.tensor([record.person for record in records], dtype=torch.int64).to(self.device)
        self._cameras = torch.tensor([record.camera for record in records], dtype=torch.int64).to(self.device)
        self._pixels = _Pixels(_Files(records, input_cfg.SIZE_TEST, BILINEAR), num_workers, self.device)

    def __len__(self) -> int:
        return -(-self._num_records // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, self._num_records, self.batch_size)
        slices = [slice(start, min(start + self.batch_size, self._num_records)) for start in starts]
        for decoded, part in zip(self._pixels([list(range(part.start, part.stop)) for part in slices]), slices):
            pixels = decoded.to(self.device, non_blocking=True)
            images = normalize(pixels, self._input.PIXEL_MEAN, self._input.PIXEL_STD, self.dtype)
            yield Batch(images, self._persons[part], self._cameras[part], self._indices[part])

    def close(self) -> None:
        self._pixels.close()
