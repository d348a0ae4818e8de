"""python -m fusionreid.dataloading.datasets.synthetic --root data/synthetic: render the data set."""

import argparse
import sys
import time

from fusionreid.dataloading.config import SyntheticConfig
from fusionreid.dataloading.datasets.synthetic import render_dataset
from fusionreid.dataloading.records import DataError, printable


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    default = SyntheticConfig()
    parser = argparse.ArgumentParser(prog="python -m fusionreid.dataloading.datasets.synthetic", description=__doc__)
    parser.add_argument("--root", default="data/synthetic", help="the folder to write, in the Market-1501 layout")
    parser.add_argument("--persons", type=int, default=default.PERSONS, help="to train on")
    parser.add_argument("--test-persons", type=int, default=default.TEST_PERSONS, help="in query and gallery")
    parser.add_argument("--cameras", type=int, default=default.CAMERAS)
    parser.add_argument("--images", type=int, default=default.IMAGES, help="per person and camera")
    parser.add_argument("--seed", type=int, default=default.SEED)
    parser.add_argument("--size", type=int, nargs=2, default=default.SIZE, metavar=("HEIGHT", "WIDTH"))
    options = vars(parser.parse_args(arguments))
    start = time.perf_counter()
    try:
        root = render_dataset(options.pop("root"), **{**options, "size": tuple(options["size"])})
    except DataError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{printable(root)}: {sum(1 for _ in root.glob('*/*.jpg')):,} images in {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
