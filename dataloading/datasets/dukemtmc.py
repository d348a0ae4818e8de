"""DukeMTMC-reID: the Market-1501 layout with other numbers."""

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets.assemble import Published
from fusionreid.dataloading.datasets.market1501 import MARKS, compare, find_folder, read_layout
from fusionreid.dataloading.records import Split

COUNTS = (16_522, 2_228, 17_661)
LAYOUT = """\
  bounding_box_train/0001_c2_f0046182.jpg    person 1, camera 2
  query/0005_c2_f0046985.jpg
  bounding_box_test/0005_c5_f0051021.jpg
the authors no longer offer the data for download"""


def read(cfg: DatasetsConfig) -> Split:
    """Read DukeMTMC-reID, found by its usual folder names in or below DATASETS.ROOT_DIR."""
    folder = find_folder(cfg.ROOT_DIR, "dukemtmc", MARKS, LAYOUT)
    return compare(read_layout(folder, "dukemtmc", published=Published(cameras=8)), COUNTS)
