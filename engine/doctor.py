"""Check what a training needs, and find what would stop it, without starting one.

`python engine/doctor.py --config_file FILE [--decode] [KEY VALUE ...]`
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import arguments, command
from fusionreid.engine.arguments import Command, Ending

if TYPE_CHECKING:
    from fusionreid.dataloading.own_data import OwnData
    from fusionreid.engine.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(COMMAND, argv)


def doctor(
    cfg: "Config", *, decode: bool, json: Path | None, write_clean: Path | None, own: "OwnData | None" = None
) -> None:
    """Check everything that a training needs; `own` are the data of --data as they were read."""
    from fusionreid.engine.preflight import examine

    examine(cfg, decode=decode, own=own, account=json, clean=write_clean)


def options(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--decode", action="store_true", help="also decode every image file whole, in parallel")
    what = "also write what was found, used and left out to a file, as in account.json"
    parser.add_argument("--json", type=arguments.file_to_write, metavar="FILE", help=what)
    what = "also write the list of what is used and sound, for train --data, as in clean.csv"
    parser.add_argument("--write-clean", type=arguments.file_to_write, metavar="FILE", help=what)


COMMAND = Command(
    doctor,
    "check data, weights, disk and memory before training",
    "Check everything that training needs, and name everything that would stop it.",
    ["--config_file my.yml --decode", "--data crops --json account.json --write-clean clean.csv"],
    options,
    takes_data=True,
    examines=True,
    ending=lambda _cfg, **_: Ending(following="train"),
)

if __name__ == "__main__":
    sys.exit(main())
