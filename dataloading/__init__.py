"""Data sets on disk, the sampling plan, and the way from files to batches."""

import re
from difflib import get_close_matches
from importlib import import_module

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.records import DataError, Record, Split

READERS = {  # name -> where its reader is
    "market1501": "fusionreid.dataloading.datasets.market1501:read",
    "dukemtmc": "fusionreid.dataloading.datasets.dukemtmc:read",
    "dukemtmcreid": "fusionreid.dataloading.datasets.dukemtmc:read",
    "msmt17": "fusionreid.dataloading.datasets.msmt17:read",
    "folder": "fusionreid.dataloading.datasets.folder:read",
    "market": "fusionreid.dataloading.datasets.market1501:read_own",
    "csv": "fusionreid.dataloading.datasets.csv_list:read",
    "synthetic": "fusionreid.dataloading.datasets.synthetic:read",
}

__all__ = ["DataError", "Record", "Split", "read_split"]


def read_split(cfg: DatasetsConfig) -> Split:
    """Read the data set DATASETS.NAMES in DATASETS.ROOT_DIR; case and punctuation of the name do not count."""
    name = re.sub("[^a-z0-9]", "", cfg.NAMES.lower())
    if name not in READERS:
        close = get_close_matches(name, READERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise DataError(f"DATASETS.NAMES must be one of {', '.join(READERS)}, got {cfg.NAMES!r}{hint}")
    module, function = READERS[name].split(":")
    split: Split = getattr(import_module(module), function)(cfg)
    return split
