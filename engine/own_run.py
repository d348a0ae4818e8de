"""A run on own data from one path: the list, the settings and the account of the data, in the folder of the run."""

import logging
import os
from pathlib import Path

from fusionreid.dataloading.account import account_as_json, refusal_as_json
from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.own_data import OwnData, fit_sizes, read_own_data, write_list
from fusionreid.dataloading.records import DataError, printable
from fusionreid.engine import config_yaml
from fusionreid.engine.config import load_config
from fusionreid.engine.config_files import find_config
from fusionreid.files import atomic_write, write_json

BASE = "own/small"
LIST, SETTINGS = "data.csv", "config.yml"
MOST_WORKERS = 8

log = logging.getLogger(__name__)


def folder_of(data: Path, name: str | None) -> Path:
    """Return OUTPUT_DIR of a run on `data`: log/<name>, by default named as the data are."""
    return Path("log") / (name or data.absolute().stem or "own")


def prepare(data: Path, folder: Path, *, account: Path | None = None, quiet: bool = False) -> Path:
    """Write the list and the settings of a run on `data` to `folder`, and return the settings' file.

    A run that has checkpoints keeps both: images that came later must not change who is trained on. `account` is a
    JSON file to write what was found, used and left out to, also if the data cannot be used. DataError says why not.
    """
    settings = folder / SETTINGS
    if settings.is_file() and any((folder / "checkpoints").glob("step-*")):
        if not quiet:
            log.info("going on with the list and the settings of %s", settings)
        return settings
    try:
        own = read_own_data(data)
    except DataError as error:
        if account:
            write_json(account, refusal_as_json(DatasetsConfig(NAMES="folder", ROOT_DIR=str(data)), error))
        raise
    if account:
        write_json(account, account_as_json(own.split))
    folder.mkdir(parents=True, exist_ok=True)
    write_list(own.split, folder / LIST)
    overrides, reasons = _fitted(own, folder)
    with atomic_write(settings, "w", encoding="utf-8") as file:
        file.write(config_yaml.dump(load_config(find_config(BASE), overrides).model_dump(exclude_unset=True)))
    if not quiet:
        for line in (*own.split.describe().splitlines(), *own.decisions, *own.split.warnings, *reasons):
            log.info("%s", printable(line))
        log.info("wrote %s and %s: change them, or set KEY VALUE pairs", folder / LIST, settings)
    return settings


def _fitted(own: OwnData, folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """Return the settings that fit data and machine, and the reason for each."""
    sizes = fit_sizes(own.split)
    workers = min(MOST_WORKERS, max(0, len(os.sched_getaffinity(0)) - 1))
    values = {
        "DATASETS.NAMES": "csv",
        "DATASETS.ROOT_DIR": (folder / LIST).absolute(),
        "DATALOADER.NUM_INSTANCE": sizes.instances,
        "DATALOADER.NUM_WORKERS": workers,
        "SOLVER.IMS_PER_BATCH": sizes.batch,
        "SOLVER.MAX_EPOCHS": sizes.epochs,
        "OUTPUT_DIR": folder.absolute(),
    }
    reasons = (*sizes.reasons, f"DATALOADER.NUM_WORKERS {workers}: cores of this machine, less one")
    return [f"{key}={value}" for key, value in values.items()], reasons
