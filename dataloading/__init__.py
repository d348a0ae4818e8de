"""Data sets on disk, the sampling plan, and the way from files to batches."""

from difflib import get_close_matches
from importlib import import_module

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.records import DataError, Record, Split
from fusionreid.dataloading.union import unite

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
    """Read the data set DATASETS.NAMES, or the union of several, whose query and gallery are those of DATASETS.TEST."""
    found = {one: _read(one) for one in dict.fromkeys((*cfg.sets, *cfg.test_sets))}
    if len(found) == 1:
        return next(iter(found.values()))
    return unite(*(tuple(found[one] for one in dict.fromkeys(sets)) for sets in (cfg.sets, cfg.test_sets)))


def _read(cfg: DatasetsConfig) -> Split:
    name = str(cfg.NAMES)
    if name not in READERS:
        close = get_close_matches(name, READERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise DataError(f"DATASETS.NAMES must be one of {', '.join(READERS)}, got {name!r}{hint}")
    module, function = READERS[name].split(":")
    split: Split = getattr(import_module(module), function)(cfg)
    return split
