"""A trained model in three lines of Python: images in, vectors out, the same that `fusionreid embed` writes."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cached_property
from itertools import islice, repeat
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from fusionreid.dataloading.decode import BILINEAR, resize_batch
from fusionreid.dataloading.given_images import Channels, GivenImage, as_images, name_of, pixels_of
from fusionreid.dataloading.loader import Batch
from fusionreid.dataloading.records import DataError, Record, printable
from fusionreid.engine.checkpoints.checkpoint import CheckpointError
from fusionreid.engine.checkpoints.load_model import Trained, find_checkpoint, restore, restore_as_trained
from fusionreid.engine.checkpoints.locate import MODEL, NoCheckpointError, checkpoint_at
from fusionreid.engine.config import Config, load_config
from fusionreid.engine.config_files import shipped_configs
from fusionreid.engine.distributed.parallel import DeviceError
from fusionreid.engine.evaluation.extract import embedded_batches
from fusionreid.engine.evaluation.finite import refuse_non_finite
from fusionreid.kernels.augmentation import normalize

SETTINGS = "config.yml"  # in the folder of a run on own data
WEIGHTS = {".pth", ".pt", ".tar", ".bin", ".safetensors", ".onnx", ".pt2"}
UNKNOWN = -1  # a camera: the mean of the known ones

Cameras = str | Sequence[str | None] | None  # one name for all images, or one per image; None: unknown


class Embedder:
    """Turns images of persons into vectors of unit length: the larger their inner product, the more alike.

    `source` is the folder of a run (`log/own`: its newest checkpoint), a checkpoint, or a configuration. `device`
    is cuda or cpu, by default the GPU if there is one. `batch` images are computed at once. Nothing is compiled, since
    every call may bring another number of images; on a CPU the vectors are those of `fusionreid embed` to the last bit
    wherever as many images are computed at once.

    Raises ReIDError: there is no checkpoint, it does not fit, or the device is not there.
    """

    def __init__(
        self, source: str | PathLike[str] | Config, *, device: str | torch.device | None = None, batch: int = 64
    ):
        if batch < 1:
            raise DataError(f"batch must be 1 or more, got {batch}")
        trained, cfg = _load(source)
        self.device, self.batch = _device(device, cfg), batch
        test = cfg.TEST.model_copy(update={"FEAT_NORM": True})
        self._cfg = cfg.model_copy(update={"TEST": test})
        self._model, self._known = trained.model.to(self.device).eval(), trained.cameras
        self._ieee = self.device.type == "cuda" and cfg.SOLVER.PRECISION == "fp32"
        embeds = trained.model.transformer is not None and trained.model.transformer.sie_embed is not None
        self.cameras = trained.camera_names if embeds else ()
        """Names of the cameras whose images the model tells apart; empty: it takes all cameras alike."""

    def __call__(
        self, images: GivenImage | Iterable[GivenImage], cameras: Cameras = None, *, channels: Channels = "rgb"
    ) -> np.ndarray:
        """Return the vectors (N, D) float32 of N images: paths, Pillow images, arrays (H, W, 3) uint8, or only one.

        `channels` says whether arrays are RGB or, as OpenCV has them, BGR. `cameras` are names out of `.cameras`: one
        for all images or one per image, None where it is not known; a model without cameras does not look at them.
        Images may come from any iterable, which is read batch by batch. DataError names the image or camera that
        cannot be used, NonFiniteError the images whose vectors are not finite.
        """
        names: list[str] = []
        batches = self._batches(as_images(images), cameras, channels, names)
        with torch.no_grad(), _ieee_products(self._ieee):
            vectors = embedded_batches(self._model, batches, self._known, self._cfg, self.device)
            rows = torch.cat([torch.empty(0, self.dimension), *(batch.cpu() for batch in vectors)])
        refuse_non_finite(rows.isfinite().all(1).tolist(), [Record(name, UNKNOWN, UNKNOWN) for name in names])
        return rows.numpy()

    @property
    def dimension(self) -> int:
        """Width D of a vector."""
        widths, part = [head.classifier.in_features for head in self._model.heads], self._cfg.TEST.FEAT
        return widths[part - 1] if part else sum(widths)

    @cached_property
    def model_digest(self) -> str:
        """BLAKE2b of the weights and of the settings that decide a vector; those of two digests cannot be compared."""
        test, given = self._cfg.TEST, self._cfg.INPUT
        settings = test.NECK_FEAT, test.FEAT, test.FLIP, given.SIZE_TEST, given.PIXEL_MEAN, given.PIXEL_STD
        digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _batches(
        self, images: Iterator[GivenImage], cameras: Cameras, channels: Channels, names: list[str]
    ) -> Iterator[Batch]:
        """Yield normalised batches on the device; `names` grows by the name of every image that is read."""
        numbers, given = self._numbers(cameras), self._cfg.INPUT
        while some := list(islice(images, self.batch)):
            start = len(names)
            names += [name_of(image, start + i) for i, image in enumerate(some)]
            theirs = list(islice(numbers, len(some)))
            if len(theirs) < len(some):
                raise DataError(f"cameras has {start + len(theirs)} names for more images: give one per image, or one")
            pixels = (pixels_of(image, name, channels) for image, name in zip(some, names[start:]))
            resized = resize_batch(pixels, len(some), given.SIZE_TEST, BILINEAR).to(self.device)
            index = torch.arange(start, len(names), device=self.device)
            cameras_of = torch.tensor(theirs, device=self.device)
            yield Batch(normalize(resized, given.PIXEL_MEAN, given.PIXEL_STD), index, cameras_of, index)
        if not isinstance(cameras, str | None) and (more := len(list(numbers))):
            raise DataError(
                f"cameras has {len(names) + more} names for {len(names)} images: give one per image, or one"
            )

    def _numbers(self, cameras: Cameras) -> Iterator[int]:
        """Yield the number of the camera of one image after the other."""
        if isinstance(cameras, str | None):
            return repeat(self._number(cameras))
        return iter([self._number(camera) for camera in cameras])

    def _number(self, camera: str | None) -> int:
        if camera is None or not self.cameras:
            return UNKNOWN
        if camera not in self.cameras:
            close = get_close_matches(str(camera), self.cameras, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise DataError(
                f"camera must be one that the model was trained with, {', '.join(map(repr, self.cameras))}, or None "
                f"for the mean of all, got {camera!r}{hint}"
            )
        return self._known[self.cameras.index(camera)]


def _load(source: str | PathLike[str] | Config) -> tuple[Trained, Config]:
    """Read the trained model of a run, a checkpoint or a configuration, and the settings to embed with."""
    if isinstance(source, Config):
        return restore(find_checkpoint(source), source), source
    source = Path(source).expanduser()
    if source.name == MODEL:
        source = source.parent
    if source.is_dir():
        return _of_folder(source)
    if source.suffix in WEIGHTS:
        raise NoCheckpointError(
            f"{printable(source)} holds weights without a configuration: name a .yml file that sets TEST.WEIGHT to it"
        )
    if not source.is_file() and str(source) not in shipped_configs():
        raise NoCheckpointError(
            f"{printable(source)} is neither the folder of a run nor a configuration file: name a folder that training "
            f"wrote, such as log/own, or a .yml file; relative paths start in {Path.cwd()}"
        )
    cfg = load_config(source)
    return restore(find_checkpoint(cfg), cfg), cfg


def _of_folder(folder: Path) -> tuple[Trained, Config]:
    """Read a run or a checkpoint; of the run's own settings, those of the model are as it was trained."""
    if not (folder / SETTINGS).is_file():
        try:
            return restore_as_trained(checkpoint_at(folder, folder))
        except NoCheckpointError as error:
            raise CheckpointError(
                f"{printable(folder)} holds no checkpoint: train the run first, or name the folder of another"
            ) from error
    cfg = load_config(folder / SETTINGS)
    path = find_checkpoint(cfg.model_copy(update={"OUTPUT_DIR": str(folder)}))  # which may have moved
    if path.is_file():
        return restore(path, cfg), cfg
    trained, trained_as = restore_as_trained(path)
    return trained, cfg.model_copy(update={"MODEL": trained_as.MODEL, "INPUT": trained_as.INPUT})


def _device(asked: str | torch.device | None, cfg: Config) -> torch.device:
    count = torch.cuda.device_count()
    if asked is None:
        return torch.device(cfg.MODEL.DEVICE if count else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise DeviceError(f"device must be cuda, cuda:0, cuda:1, ... or cpu, got {asked!r}") from error
    if device.type not in ("cuda", "cpu"):
        raise DeviceError(f"device must be cuda, cuda:0, cuda:1, ... or cpu, got {asked!r}")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(
            f"device is {asked}, torch finds {count} GPUs: check the driver, or name another, such as cpu"
        )
    return device


@contextmanager
def _ieee_products(wanted: bool) -> Iterator[None]:
    """Compute without TF32 on a GPU where it is wanted, and leave the process as it was."""
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul) if wanted else ()
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value
