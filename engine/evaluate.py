"""Evaluate a model: checkpoint -> embeddings of query and gallery -> ranks -> mAP, mINP, CMC.

`python engine/evaluate.py --config_file FILE [--baselines] [KEY VALUE ...]`. The embeddings stay in
OUTPUT_DIR/embeddings; `TEST.EMBEDDINGS FOLDER` ranks such a folder again, without a model.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import command
from fusionreid.engine.arguments import Command, Ending, search_in

if TYPE_CHECKING:
    from fusionreid.engine.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(COMMAND, argv)


def evaluate(cfg: "Config", *, baselines: bool) -> None:
    """Rank the gallery for every query, by a checkpoint or by stored embeddings."""
    from fusionreid.engine.monitoring import memory
    from fusionreid.engine.storage import lock

    with lock(Path(cfg.OUTPUT_DIR)) if command.RANK == 0 else nullcontext(), memory.explained("evaluation", cfg):
        from fusionreid.engine.reporting.evaluate_run import evaluate_checkpoint, evaluate_stored

        if cfg.TEST.EMBEDDINGS:
            evaluate_stored(cfg)
        else:
            evaluate_checkpoint(cfg, baselines=baselines)


def options(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    what = "also rank by an untrained network and by colour histograms"
    parser.add_argument("--baselines", action="store_true", help=what)


def ending(cfg: "Config", *, baselines: bool) -> Ending:
    """Say what was written and what usually comes next."""
    output = Path(cfg.OUTPUT_DIR)
    if cfg.TEST.EMBEDDINGS:
        return Ending([output / "metrics.json"], search_in(cfg.TEST.EMBEDDINGS))
    report, embeddings = output / "report.html", output / "embeddings"
    return Ending([output / "metrics.json", report, embeddings], f"open {report}, or {search_in(embeddings)}")


COMMAND = Command(
    evaluate,
    "measure a model: mAP, mINP, CMC, a report",
    "Embed query and gallery with the newest checkpoint in OUTPUT_DIR, or with TEST.WEIGHT, and rank them.\n"
    "TEST.EMBEDDINGS FOLDER ranks stored embeddings again, without a model.",
    ["--config_file synthetic/tiny", "--config_file my.yml --baselines TEST.RE_RANKING yes"],
    options,
    ending=ending,
)

if __name__ == "__main__":
    sys.exit(main())
