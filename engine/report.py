"""Draw report.html again from the files that a run left, and compare it with other runs.

`python engine/report.py --config_file FILE [--compare FOLDER]... [KEY VALUE ...]` reads OUTPUT_DIR: metrics.json, the
pictures, and the log and manifest of training. Of each other folder it shows results and loss, and in which settings
the runs differ. No model, no images, no GPU.
"""

import logging
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

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(COMMAND, argv)


def report(cfg: "Config", *, compare: Sequence[Path]) -> None:
    """Draw the report of a run again, others beside it if asked."""
    from fusionreid.dataloading.records import printable
    from fusionreid.engine.reporting.run_record import LOG, METRICS, QUERIES
    from fusionreid.engine.reporting.runs import draw_report

    output = Path(cfg.OUTPUT_DIR)
    draw_report(output, cfg, compare)
    for folder in (output, *compare):
        shown = {METRICS: "results", LOG: "training curves"} | ({QUERIES: "queries"} if folder == output else {})
        for name, what in shown.items():
            if not (folder / name).exists():
                log.warning("%s has no %s: the report shows no %s of it", printable(folder), name, what)


def options(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    other = "OUTPUT_DIR of another run to show as well, as in log/baseline; may be repeated"
    parser.add_argument("--compare", action="append", default=[], type=arguments.path, metavar="FOLDER", help=other)


def ending(cfg: "Config", *, compare: Sequence[Path]) -> Ending:
    """Say what was written and what usually comes next."""
    return Ending([Path(cfg.OUTPUT_DIR) / "report.html"], "open it in a browser")


COMMAND = Command(
    report,
    "draw the report of a run again, or compare runs",
    "Draw report.html from what a run left in OUTPUT_DIR: results, curves, rank lists. No model or image is read.",
    ["--config_file my.yml", "--config_file my.yml --compare log/baseline --compare log/larger"],
    options,
    ending=ending,
)

if __name__ == "__main__":
    sys.exit(main())
