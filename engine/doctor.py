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
    from fusionreid.engine.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(COMMAND, argv)


def doctor(cfg: "Config", *, decode: bool, json: Path | None = None) -> None:
    """Check everything that a training needs."""
    from fusionreid.engine.preflight import examine, write_account

    if json:
        write_account(cfg, json)
    examine(cfg, decode=decode)


def options(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--decode", action="store_true", help="also decode every image file whole, in parallel")
    what = "also write what was found, used and left out to a file, as in account.json"
    parser.add_argument("--json", type=arguments.path, metavar="FILE", help=what)


COMMAND = Command(
    doctor,
    "check data, weights, disk and memory before training",
    "Check what a training needs, piece by piece, and name everything that would stop it.",
    ["--config_file my.yml --decode", "--data crops --json account.json"],
    options,
    takes_data=True,
    ending=lambda _cfg, **_: Ending(following="train"),
)

if __name__ == "__main__":
    sys.exit(main())
