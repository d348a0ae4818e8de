"""The door of the report: draws report.html again from the files that a run left, and other runs beside it.

`python engine/report.py --config_file FILE [--beside FOLDER]... [KEY VALUE ...]` reads OUTPUT_DIR: metrics.json, the
pictures, and the log and manifest of training. Of each other folder it shows results and loss, and in which settings
the runs differ. No model, no images, no GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import command
from fusionreid.engine.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--beside", action="append", default=[], type=Path, metavar="FOLDER")
    options, rest = parser.parse_known_args(argv)

    def report(cfg: Config) -> None:
        from fusionreid.engine.reporting.runs import draw_report

        draw_report(Path(cfg.OUTPUT_DIR), cfg, options.beside)

    return command.run(report, rest)


if __name__ == "__main__":
    sys.exit(main())
