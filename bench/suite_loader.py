"""Training images: augmentation of one batch, and a whole epoch, against torchvision on Pillow images and on tensors.

An epoch is timed from files, by every decoder that is installed, and from images resident in memory once their file is
there: as every epoch but the very first.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import functional as T
from torchvision.transforms.v2.functional import resize

from bench.builds import Launch
from bench.timing import Case, Settings, Work
from fusionreid.dataloading import read_split
from fusionreid.dataloading.config import DataloaderConfig, DatasetsConfig, InputConfig, SyntheticConfig
from fusionreid.dataloading.decode_workers import fork_server
from fusionreid.dataloading.loader import TrainLoader
from fusionreid.dataloading.plan import EpochPlan
from fusionreid.dataloading.records import Record
from fusionreid.kernels import augment

SOURCES = (
    "dataloading/loader.py",
    "dataloading/image_source.py",
    "dataloading/decode.py",
    "dataloading/decode_workers.py",
    "dataloading/dali.py",
    "dataloading/cache.py",
    "kernels/augmentation.py",
    "kernels/noise.py",
    "kernels/philox.py",
)
# persons, images of each and camera (two cameras), batch size, height and width of the input, numbers of workers
SIZES: dict[str, tuple[int, int, int, tuple[int, int], tuple[int, ...]]] = {
    "quick": (4, 2, 8, (96, 48), (0,)),
    "default": (16, 8, 64, (256, 128), (0, 2)),
    "full": (64, 16, 128, (256, 128), (0, 14)),
}
INSTANCES, SEED, EPOCH, PADDING = 4, 1111, 1, 10
MEAN = STD = (0.5, 0.5, 0.5)
GREY_LEVELS = 4 / 255 / STD[0]  # what two decoders and two bicubic filters may differ by, of the largest value


def launches() -> Iterator[Launch]:
    """List the launch of a batch's augmentation; its first dimension is smaller than the real one."""
    _, _, batch, (height, width), _ = SIZES["full"]
    images = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    flip, shift, erase = torch.zeros(1, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 4).int()
    call = partial(augment, images, flip, shift, erase, shift[:, 0], seed=SEED, epoch=EPOCH, mean=MEAN, std=STD)
    for dtype in (torch.bfloat16, torch.float32):
        yield Launch(
            f"augmentation, B {batch}, {height} x {width}, {str(dtype).removeprefix('torch.')}",
            partial(call, dtype=dtype),
            batch * images.numel() * (1 + dtype.itemsize),
            0.0,
            batch,
        )


def cases(settings: Settings) -> list[Case]:
    """List the cases of a size."""
    persons, images, batch, size, workers = SIZES[settings.size]
    shape = f"B {batch}, {size[0]} x {size[1]}, float32"
    count = persons * 2 * images // batch * batch
    decoders = ["torchvision", *(["dali"] if _has_dali() else [])]
    places = ["host", *(["device"] if settings.device.type == "cuda" else [])]
    ways = [(f"files by {decoder}", {"BACKEND": decoder, "CACHE": "none"}) for decoder in decoders]
    if "dali" in decoders:
        ways.append(("files augmented by dali", {"BACKEND": "dali", "AUGMENT": "dali", "CACHE": "none"}))
    ways += [(f"images in {place} memory", {"CACHE": place}) for place in places]
    epochs = [
        Case(f"an epoch, {name}, {n} workers", f"{count}, {shape}", partial(epoch, settings, _loading(n, **how)))
        for name, how in ways
        for n in workers
    ]
    return [Case("augmentation of a batch", shape, partial(augmentation, settings)), *epochs]


def _loading(workers: int, **how: str) -> DataloaderConfig:
    return DataloaderConfig.model_validate({"NUM_WORKERS": workers, "NUM_INSTANCE": INSTANCES, **how})


@contextmanager
def augmentation(settings: Settings) -> Iterator[Work]:
    """Prepare the augmentation of a batch and its alternatives."""
    with _train_loader(settings, _loading(0)) as (train, _):
        plan, count = train.plan(EPOCH), train.batch_size
        height, width = SIZES[settings.size][3]
        pixels = torch.randint(256, (count, height, width, 3), dtype=torch.uint8, device=settings.device)
        names = ("flip", "shift", "erase")
        parameters = [torch.from_numpy(getattr(plan, name)[:count]).to(settings.device) for name in names]
        parameters.append(torch.arange(count, device=settings.device))

        def ours() -> Tensor:
            return augment(pixels, *parameters, seed=SEED, epoch=EPOCH, mean=MEAN, std=STD)

        def by_image() -> Tensor:
            images = pixels.permute(0, 3, 1, 2)
            return torch.stack([transformed(image, plan, i) for i, image in enumerate(images)])

        providers = {"ours": ours, "torchvision, image by image": by_image}
        moved = pixels.numel() * (1 + 4)  # uint8 in, float32 out
        yield Work(providers, 1e-5, moved, items=count, compared=lambda images: visible(images, plan.erase))


@contextmanager
def epoch(settings: Settings, loading: DataloaderConfig) -> Iterator[Work]:
    """Prepare an epoch of batches from files and its alternatives."""
    workers = loading.NUM_WORKERS
    with _train_loader(settings, loading) as (train, records):
        plan, size = train.plan(EPOCH), SIZES[settings.size][3]
        batches = np.arange(len(plan.image)).reshape(-1, train.batch_size).tolist()
        usual = {
            name: DataLoader(
                FilesDataset(records, plan, size, read),
                batch_sampler=batches,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=settings.device.type == "cuda",
                multiprocessing_context=fork_server() if workers else None,
            )
            for name, read in {"Pillow and torchvision": by_pillow, "torchvision on tensors": by_torchvision}.items()
        }
        providers: dict[str, Callable[[], Tensor]] = {
            "ours": lambda: last(batch.images for batch in train.batches(EPOCH)),
            **{name: partial(delivered, loader, settings.device) for name, loader in usual.items()},
        }
        erase = plan.erase[-train.batch_size :]
        try:
            compared = partial(visible, erase=erase)
            yield Work(providers, GREY_LEVELS, items=len(plan.image), compared=compared, on_host=True)
        finally:
            for loader in usual.values():
                if loader._iterator is not None:
                    loader._iterator._shutdown_workers()


class FilesDataset(Dataset[Tensor]):
    """Dataset of the usual transforms, image by image in the workers, with the parameters of the plan."""

    def __init__(
        self,
        records: Sequence[Record],
        plan: EpochPlan,
        size: tuple[int, int],
        read: Callable[[str], Image.Image | Tensor],
    ) -> None:
        self.records, self.plan, self.size, self.read = records, plan, size, read

    def __getitem__(self, position: int) -> Tensor:
        image = self.read(str(self.records[self.plan.image[position]].path))
        resized = resize(image, list(self.size), T.InterpolationMode.BICUBIC)  # of bytes; the older one makes floats
        return transformed(resized, self.plan, position)


def by_pillow(path: str) -> Image.Image:
    """Decode a file by Pillow."""
    with Image.open(path) as file:
        return file.convert("RGB")


def by_torchvision(path: str) -> Tensor:
    """Decode a file by torchvision."""
    return decode_image(path, ImageReadMode.RGB)


def delivered(loader: DataLoader, device: torch.device) -> Tensor:
    """Return the last batch of a loader, on the device."""
    return last(images.to(device, non_blocking=True) for images in loader)


def transformed(image: Image.Image | Tensor, plan: EpochPlan, position: int) -> Tensor:
    """Flip, pad, crop, convert to float, normalise and erase an image."""
    height, width = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[1:]
    if plan.flip[position]:
        image = T.hflip(image)
    top, left = (PADDING + int(shift) for shift in plan.shift[position])
    image = T.crop(T.pad(image, [PADDING]), top, left, height, width)
    pixels = T.to_tensor(image) if isinstance(image, Image.Image) else image.float() / 255
    pixels = T.normalize(pixels, list(MEAN), list(STD))
    top, left, rows, cols = (int(value) for value in plan.erase[position])
    if rows:
        pixels[:, top : top + rows, left : left + cols] = torch.randn(3, rows, cols, device=pixels.device)
    return pixels


def last(batches: Iterable[Tensor]) -> Tensor:
    """Return the last of all batches, which come and go one by one as in training."""
    return deque(batches, maxlen=1)[0]


def visible(images: Tensor, erase: np.ndarray) -> list[Tensor]:
    """Blank the erased rectangles: their noise differs between implementations."""
    images = images.clone()
    for image, (top, left, rows, cols) in zip(images, erase.tolist()):
        image[:, top : top + rows, left : left + cols] = 0
    return [images]


@contextmanager
def _train_loader(settings: Settings, loading: DataloaderConfig) -> Iterator[tuple[TrainLoader, Sequence[Record]]]:
    persons, images, batch, size, _ = SIZES[settings.size]
    with TemporaryDirectory() as root:
        rendered = SyntheticConfig(PERSONS=persons, TEST_PERSONS=1, CAMERAS=2, IMAGES=images)
        split = read_split(DatasetsConfig(NAMES="synthetic", ROOT_DIR=root, SYNTHETIC=rendered))
        given = InputConfig(SIZE_TRAIN=size, PADDING=PADDING, PIXEL_MEAN=MEAN, PIXEL_STD=STD)
        loader = TrainLoader(split, given, loading, batch_size=batch, seed=SEED, device=settings.device)
        with closing(loader):
            yield loader, split.train


def _has_dali() -> bool:
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # nothing of its publisher is installed
        return False
