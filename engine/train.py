"""The door of training: `torchrun engine/train.py --config_file FILE [KEY VALUE ...]`; plain python is one process."""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import command
from fusionreid.engine.config import Config
from fusionreid.engine.monitoring.loggers import check_boards
from fusionreid.engine.monitoring.startup import Startup
from fusionreid.weights import check_weights


def main(argv: list[str] | None = None) -> int:
    return command.run(train, argv)


def train(cfg: Config) -> None:
    startup = Startup()
    check_weights(cfg.MODEL)
    check_boards(cfg.SOLVER.LOGGERS)
    from fusionreid.engine.distributed import (
        parallel,  # torch loads only now: a mistake in the configuration has shown at once
    )
    from fusionreid.engine.training.trainer import Run

    startup.lap("imports")
    Run(cfg, startup).train()
    parallel.finish()


if __name__ == "__main__":
    sys.exit(main())
