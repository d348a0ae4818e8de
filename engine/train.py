"""The door of training: `torchrun engine/train.py --config_file FILE [KEY VALUE ...]`; plain python is one process."""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import command
from fusionreid.engine.config import Config
from fusionreid.engine.monitoring.loggers import check_loggers
from fusionreid.engine.monitoring.startup import Startup
from fusionreid.weights import check_weights


def main(argv: list[str] | None = None) -> int:
    return command.run(train, argv)


def train(cfg: Config) -> None:
    """Train to the last epoch, from the newest checkpoint in OUTPUT_DIR if there is one."""
    startup = Startup()
    check_weights(cfg.MODEL)
    check_loggers(cfg.SOLVER.LOGGERS)
    # torch loads only now: a mistake in the configuration has been reported at once.
    from fusionreid.engine.distributed import parallel
    from fusionreid.engine.training.trainer import Trainer

    startup.lap("imports")
    trainer = Trainer(cfg, startup)
    with command.Stop() as stop:  # until here a signal ends the process at once: there is nothing to save
        trainer.train(stop)
    parallel.finish()


if __name__ == "__main__":
    sys.exit(main())
