"""A run on own data from one path: the list, the settings and the account of the data, in the folder of the run."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fusionreid.dataloading.account import refusal_as_json, write_list
from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.own_data import OwnData, fit_sizes, read_own_data
from fusionreid.dataloading.records import DataError, printable
from fusionreid.dataloading.shared_memory import SHARED, most_workers
from fusionreid.engine import config_yaml
from fusionreid.engine.config import KEYS, load_config
from fusionreid.engine.config_files import find_config
from fusionreid.files import atomic_write, write_json

BASE = "own/small"
LIST, SETTINGS = "data.csv", "config.yml"
MOST_WORKERS = 8
RANDOM = {"MODEL.PRETRAIN_CHOICE": "none", "SOLVER.BASE_LR": 1e-3}  # in place of weights that cannot be had
WHY = "no pretrained weights could be fetched"

log = logging.getLogger(__name__)


class OwnRun(NamedTuple):
    """The settings of a run on own data, and the data as they were read now, if they were."""

    settings: Path
    own: OwnData | None


def folder_of(data: Path, name: str | None, overrides: Sequence[str] = ()) -> Path:
    """Return OUTPUT_DIR of a run on `data`: as the overrides have it, or log/<name>, by default named as the data."""
    chosen = config_yaml.read_overrides(overrides, KEYS, []).get("OUTPUT_DIR")
    if chosen is not None and isinstance(chosen.value, str):
        return Path(chosen.value).expanduser()
    return Path("log") / (name or data.absolute().stem or "own")


def prepare(
    data: Path,
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    examine: bool = False,
    account: Path | None = None,
    quiet: bool = False,
) -> OwnRun:
    """Write the list and the settings of a run on `data` to `folder`.

    A run that has checkpoints keeps both: images that came later must not change who is trained on. `examine`: read
    the data in any case, and go on with what is sound in them. DataError: they cannot be used as they are; the JSON
    file `account` then says so too.
    """
    settings = folder / SETTINGS
    kept = settings.is_file() and any((folder / "checkpoints").glob("step-*"))
    if kept and not quiet:
        log.info("going on with the list and the settings of %s", settings)
    try:
        own = read_own_data(data) if examine or not kept else None
    except DataError as error:
        if account:
            write_json(account, refusal_as_json(DatasetsConfig(NAMES="folder", ROOT_DIR=str(data)), error))
        raise
    if own is None or kept:
        return OwnRun(settings, own)
    if own.faults and not examine:
        remedy = f"doctor --data {printable(data)} --write-clean clean.csv writes a list without these images"
        raise DataError("\n".join([*own.faults, f"settle this; or {remedy}, for train --data clean.csv"]))
    folder.mkdir(parents=True, exist_ok=True)
    write_list(own.split, folder / LIST)
    settled, reasons = _fitted(own, folder)
    weights, about = _weights(overrides, quiet=quiet)
    settled, reasons = [*settled, *weights], (*reasons, *about)
    with atomic_write(settings, "w", encoding="utf-8") as file:
        file.write(config_yaml.dump(load_config(find_config(BASE), settled).model_dump(exclude_unset=True)))
    if not quiet:
        set_here = config_yaml.read_overrides(overrides, KEYS, [])
        reasons = tuple(reason for reason in reasons if reason.partition(" ")[0] not in set_here)
        about = () if examine else (*own.split.describe().splitlines(), *own.decisions, *own.split.warnings)
        for line in (*about, *reasons):
            log.info("%s", printable(line))
        log.info("wrote %s and %s: change them, or set KEY VALUE pairs", folder / LIST, settings)
    return OwnRun(settings, own)


def _fitted(own: OwnData, folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """Return the settings that fit data and machine, and the reason for each."""
    sizes, base = fit_sizes(own.split), load_config(find_config(BASE))
    wanted = min(MOST_WORKERS, max(0, len(os.sched_getaffinity(0)) - 1))
    height, width = base.INPUT.SIZE_TEST
    workers = most_workers(wanted, 3 * height * width * max(sizes.batch, base.TEST.IMS_PER_BATCH))
    limit = "cores of this machine, less one" if workers == wanted else f"there is no room for {wanted} in {SHARED}"
    values = {
        "DATASETS.NAMES": "csv",
        "DATASETS.ROOT_DIR": (folder / LIST).absolute(),
        "DATALOADER.NUM_INSTANCE": sizes.instances,
        "DATALOADER.NUM_WORKERS": workers,
        "SOLVER.IMS_PER_BATCH": sizes.batch,
        "SOLVER.MAX_EPOCHS": sizes.epochs,
        "OUTPUT_DIR": folder.absolute(),
    }
    reasons = (*sizes.reasons, f"DATALOADER.NUM_WORKERS {workers}: {limit}")
    return [f"{key}={value}" for key, value in values.items()], reasons


def _weights(overrides: Sequence[str], *, quiet: bool) -> tuple[list[str], tuple[str, ...]]:
    """Return the settings of the weights to start from, pinned; random ones where the others cannot be had, and why."""
    from fusionreid.weights.named import NotFetchedError, addresses, pinned

    model = load_config(find_config(BASE), overrides).MODEL
    keys = "PRETRAIN_PATH_R", "PRETRAIN_PATH_T"
    try:
        found = pinned(model)
    except NotFetchedError as error:
        if not quiet:
            files = " and ".join(addresses(model))
            log.warning(
                "training starts from random weights, which learn far less from few persons: %s. To start from them, "
                "download %s, and set MODEL.PRETRAIN_CHOICE imagenet and the paths of the files, MODEL.PRETRAIN_PATH_R "
                "and _T",
                str(error).partition("; download")[0],
                files,
            )
        return [f"{key}={value}" for key, value in RANDOM.items()], tuple(f"{k} {v}: {WHY}" for k, v in RANDOM.items())
    changed = [key for key in keys if getattr(found, key) != getattr(model, key)]
    settings = [f"MODEL.{key}={getattr(found, key)}" for key in changed]
    return settings, tuple(f"MODEL.{key} {getattr(found, key)}: fetched by the name of the backbone" for key in changed)
