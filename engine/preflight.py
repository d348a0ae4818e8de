"""The checks of `doctor`: a table with a row for everything that a training needs, and an exit code."""

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch

from fusionreid import FusionReID
from fusionreid.dataloading import DataError, Split, read_split
from fusionreid.dataloading.account import account_as_json, refusal_as_json, write_clean
from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.cache import free_host_memory
from fusionreid.dataloading.dataset_warnings import few_persons
from fusionreid.dataloading.decode import BICUBIC, decode
from fusionreid.dataloading.own_data import OwnData
from fusionreid.dataloading.records import check_batch, printable, scarce_persons
from fusionreid.dataloading.shared_memory import check_shared_memory
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.compare import compare
from fusionreid.engine.checkpoints.load_model import build, find_checkpoint, restore
from fusionreid.engine.config import Config
from fusionreid.engine.evaluation.cameras import tested_in_training
from fusionreid.engine.training.resume import position_of
from fusionreid.errors import ReIDError
from fusionreid.files import write_json
from fusionreid.weights import check_weights, load_pretrained

NEEDED = ("torch", "torchvision", "timm", "triton", "numpy", "pillow", "safetensors", "tensorboard")
OPTIONAL = ("nvidia-dali-cuda130",)
CHECKPOINTS = 3  # on disk at once: two are kept beside the one being written
STATES = {"SGD": 1, "AdamW": 2, "Adam": 2}  # numbers an optimiser keeps for a weight
NAME, VERDICT = 15, 9  # columns of the table
DATA_ROWS = "own data", "data set", "image files", "batches", "test"

T = TypeVar("T")


class Unfit(ReIDError, RuntimeError):
    """Something would stop a training; the exit code is that of the first such thing."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Table:
    """A table that prints each row as soon as it is known."""

    def __init__(self) -> None:
        self.wrong: dict[str, int] = {}  # name of a row -> exit code
        self.told: dict[str, str] = {}  # name of such a row -> its text

    def row(self, name: str, work: Callable[[], tuple[str, T]]) -> T | None:
        """Print the row of a check; its finding, or None where it met what would stop a training."""
        try:
            text, found = work()
            self._print(name, getattr(found, "verdict", "ok"), text)
            return found
        except Exception as error:
            code = getattr(error, "exit_code", 2 if isinstance(error, OSError) else None)
            if code is None:
                raise  # our mistake
            self._print(name, "WRONG", str(error))
            self.wrong[name], self.told[name] = code, str(error)
            return None

    def _print(self, name: str, verdict: str, text: str) -> None:
        first, *more = text.splitlines() or [""]
        print(f"{name:{NAME}}{verdict:{VERDICT}}{first}")
        for line in more:
            print(f"{'':{NAME + VERDICT}}{line}", flush=True)


def examine(
    cfg: Config,
    *,
    decode: bool = False,
    own: OwnData | None = None,
    account: Path | None = None,
    clean: Path | None = None,
) -> None:
    """Print the table of the configuration; raise `Unfit` at its end if anything in it is wrong.

    `own` are the data of `--data` as they were read. `account` and `clean` are files to write: the account of the data
    as JSON, and the list of what is used and sound.
    """
    table, rule = Table(), BadImages(cfg.DATASETS.ON_BAD, Path(cfg.OUTPUT_DIR))
    table.row("versions", _versions)
    table.row("device", lambda: _device(cfg))
    if own is not None:
        table.row("own data", lambda: _own_data(own))
    split = table.row("data set", lambda: _data_set(cfg))
    if split is not None:
        found: Split = split
        split = table.row("image files", lambda: _image_files(cfg, rule, found, decode)) or found
        table.row("batches", lambda: _batches(cfg, found))
        table.row("test", lambda: _test(cfg, found))
    wrong = [line for name in DATA_ROWS for line in table.told.get(name, "").splitlines()]
    whole, divided = (own.split, own.divided) if own else (split, False)
    if account:
        refused = partial(refusal_as_json, cfg.DATASETS, DataError("\n".join(wrong)))
        write_json(account, account_as_json(whole, rule.entries, wrong) if whole else refused())
    if clean and whole:
        table.row("clean list", lambda: (write_clean(whole, clean, rule.entries, with_parts=not divided), None))
    model = table.row("weights", lambda: _weights(cfg, split))
    table.row("checkpoint", lambda: _checkpoint(cfg, model))
    table.row("disk", lambda: _disk(cfg, model.num_parameters if model else 0))
    table.row("memory", lambda: _memory(cfg, split))
    if table.wrong:
        raise Unfit(f"a training would stop at: {', '.join(table.wrong)}", next(iter(table.wrong.values())))


def _own_data(own: OwnData) -> tuple[str, Split]:
    """Describe what --data was read as; Unfit if its owner must settle something first."""
    text = "\n".join([own.split.describe(), *own.decisions, *(f"warning: {line}" for line in own.split.warnings)])
    if own.faults:
        raise Unfit("\n".join([*own.faults, "these images are left out here; without them:", text]))
    return text, own.split


def _versions() -> tuple[str, None]:
    found, missing = [f"python {platform.python_version()}"], []
    for name in (*NEEDED, *OPTIONAL):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    absent = [name for name in missing if name in NEEDED]
    if absent:
        raise Unfit(f"not installed: {', '.join(absent)}; pip install {' '.join(absent)}")
    return "\n".join([", ".join(found), *(f"not installed, and not needed: {name}" for name in missing)]), None


def _device(cfg: Config) -> tuple[str, None]:
    wanted = cfg.MODEL.DEVICE == "cuda" and "DEVICE" in cfg.MODEL.model_fields_set
    if wanted and not torch.cuda.is_available():
        raise Unfit("MODEL.DEVICE is cuda and torch finds no GPU: check the driver, or set MODEL.DEVICE cpu")
    if cfg.MODEL.DEVICE == "cpu" or not torch.cuda.is_available():
        return f"CPU, {len(os.sched_getaffinity(0))} cores", None
    lines = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        lines.append(f"{index}: {name}, compute capability {major}.{minor}, {_gb(free)} of {_gb(total)} free")
    return "\n".join(lines), None


def _data_set(cfg: Config) -> tuple[str, Split]:
    split = read_split(cfg.DATASETS)
    return "\n".join([split.describe(), *(f"warning: {warning}" for warning in split.warnings)]), split


def _image_files(cfg: Config, rule: BadImages, split: Split, whole: bool) -> tuple[str, Split]:
    whole_decode = partial(decode, size=cfg.INPUT.SIZE_TRAIN, resize=BICUBIC) if whole else None
    used = rule.check(replace(split, warnings=()), decode=whole_decode)  # the row above has those of the reader
    how = "decoded" if whole else "header and end read"
    note = used.note.removeprefix(split.note).removeprefix("; ")
    return "\n".join([f"{rule.total:,}: {how}", *([note] if note else [])]), used


def _batches(cfg: Config, split: Split) -> tuple[str, None]:
    batch, instances = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE
    check_batch(split, batch, instances, balance=cfg.DATALOADER.BALANCE_SETS)
    persons = batch // instances
    most = persons if cfg.PARALLEL.EXACT is not False else max(persons // 2, 1)  # a process alone mines among two
    shares = ", ".join(str(n) for n in range(1, most + 1) if persons % n == 0)
    lines = [f"{persons} persons x {instances} images, for {shares} processes"]
    if scarce := scarce_persons(split, instances):
        lines.append(f"{scarce} persons have fewer than {instances} images: theirs repeat in a batch")
    return "\n".join(lines), None


def _test(cfg: Config, split: Split) -> tuple[str, Split]:
    tested_in_training(split, cfg)
    lines = [
        f"{f'{test.label}: ' if split.tested else ''}{len(test.query):,} queries in {len(test.gallery):,} images"
        for test in split.tests
    ]
    warnings = tuple(few_persons(split))
    return "\n".join([*lines, *warnings]), replace(split, warnings=warnings, left_out={})


def _weights(cfg: Config, split: Split | None) -> tuple[str, FusionReID]:
    check_weights(cfg.MODEL)
    persons, cameras = (split.num_persons, split.num_cameras) if split and split.train else (1, 1)
    with torch.device("meta" if cfg.MODEL.PRETRAIN_CHOICE == "none" else "cpu"):
        model = build(cfg, persons, cameras)
    lines = [report.describe() for report in load_pretrained(model, cfg.MODEL)] or ["initialised at random"]
    return "\n".join([f"{model.num_parameters / 1e6:.1f} M parameters", *lines]), model


def _checkpoint(cfg: Config, model: FusionReID | None) -> tuple[str, None]:
    """Check what training would go on from as it does itself, and what TEST.WEIGHT names as `evaluate` does."""
    folder = Path(cfg.OUTPUT_DIR) / "checkpoints"
    text = f"none in {folder}: training starts from scratch"
    checkpoint.read_progress(folder)
    if newest := checkpoint.latest(folder):
        tensors, state = checkpoint.load(newest)
        position_of(state, newest, cfg)
        if model is not None:
            compare(f"{newest}: the model", model.state_dict(), tensors.get("model", {}))
        text = f"training resumes from {newest}"
    if cfg.TEST.WEIGHT:
        path = find_checkpoint(cfg)
        restore(path, cfg)
        text += f"\nTEST.WEIGHT {path} is whole and fits the model"
    return text, None


def _disk(cfg: Config, parameters: int) -> tuple[str, None]:
    output = Path(cfg.OUTPUT_DIR).absolute()
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise Unfit(f"OUTPUT_DIR {printable(output)} cannot be written; set another one")
    free = shutil.disk_usage(there).free
    needed = CHECKPOINTS * 4 * parameters * (1 + STATES[cfg.SOLVER.OPTIMIZER_NAME])
    text = f"{_gb(free)} free for {printable(output)}, {CHECKPOINTS} checkpoints need {_gb(needed)}"
    if free < needed:
        raise Unfit(f"{text}: make room or set another OUTPUT_DIR", 4)
    return text, None


def _memory(cfg: Config, split: Split | None) -> tuple[str, None]:
    sizes = (cfg.INPUT.SIZE_TRAIN, cfg.SOLVER.IMS_PER_BATCH), (cfg.INPUT.SIZE_TEST, cfg.TEST.IMS_PER_BATCH)
    batch = max(3 * height * width * images for (height, width), images in sizes)
    shared = check_shared_memory(cfg.DATALOADER.NUM_WORKERS, batch)
    images = ""
    if split:
        counts = len(split.train), len(split.query) + len(split.gallery)
        train, test = (_gb(3 * h * w * count) for ((h, w), _), count in zip(sizes, counts, strict=True))
        images = f", decoded the training images are {train}, query and gallery {test}"
    return f"{_gb(free_host_memory())} free{images}\n{shared}", None


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
