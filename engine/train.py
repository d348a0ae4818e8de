"""The door of training: `torchrun engine/train.py --config_file FILE [KEY VALUE ...]`; plain python is one process."""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine import door
from engine.config import Config
from engine.watching.boards import check_boards
from engine.watching.startup import Startup
from fusionreid.pretrained import check_weights


def main(argv: list[str] | None = None) -> int:
    return door.run(train, argv)


def train(cfg: Config) -> None:
    startup = Startup()
    check_weights(cfg.MODEL)
    check_boards(cfg.SOLVER.LOGGERS)
    from engine import parallel  # torch loads only now: a mistake in the configuration has shown at once
    from engine.loop import Run

    startup.lap("imports")
    Run(cfg, startup).train()
    parallel.finish()


if __name__ == "__main__":
    sys.exit(main())
