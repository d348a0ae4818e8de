"""Train a model: `torchrun engine/train.py --config_file FILE [KEY VALUE ...]`; plain python is one process."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import command
from fusionreid.engine.arguments import Command, Ending
from fusionreid.engine.signals import Stop

if TYPE_CHECKING:
    from fusionreid.engine.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(COMMAND, argv)


def train(cfg: "Config") -> None:
    """Train to the last epoch, from the newest checkpoint in OUTPUT_DIR if there is one."""
    from fusionreid.engine.monitoring.loggers import check_loggers
    from fusionreid.engine.monitoring.startup import Startup
    from fusionreid.weights import check_weights

    startup = Startup()
    check_weights(cfg.MODEL)
    check_loggers(cfg.SOLVER.LOGGERS)
    # torch loads only now: a mistake in the configuration has been reported at once.
    from fusionreid.engine.distributed import parallel
    from fusionreid.engine.reporting.evaluate_run import report_evaluation
    from fusionreid.engine.training.trainer import Trainer
    from fusionreid.weights.named import pinned

    startup.lap("imports")
    trainer = Trainer(cfg.model_copy(update={"MODEL": pinned(cfg.MODEL)}), startup, report_evaluation)
    with Stop() as stop:  # until here a signal ends the process at once: there is nothing to save
        trainer.train(stop)
    parallel.finish()


def ending(cfg: "Config") -> Ending:
    """Say what was written and what usually comes next."""
    from fusionreid.engine.checkpoints.checkpoint import checkpoints

    return Ending(checkpoints(Path(cfg.OUTPUT_DIR) / "checkpoints")[-1:], "evaluate")


COMMAND = Command(
    train,
    "train a model, or resume an interrupted run",
    "Train a model. The same command resumes an interrupted run with the same OUTPUT_DIR.\n"
    "torchrun starts one process per GPU.",
    [
        "--config_file synthetic/tiny",
        "--data crops --name shop",
        "--config_file my.yml SOLVER.MAX_EPOCHS 60 OUTPUT_DIR log/long",
    ],
    takes_data=True,
    ending=ending,
    interrupted="the same command resumes from the newest checkpoint",
)

if __name__ == "__main__":
    sys.exit(main())
