"""The door of training: `torchrun engine/train.py --config_file FILE [KEY VALUE ...]`; plain python is one process."""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine import door
from engine.config import Config
from fusionreid.pretrained import check_weights


def main(argv: list[str] | None = None) -> int:
    return door.run(train, argv)


def train(cfg: Config) -> None:
    check_weights(cfg.MODEL)
    from engine.loop import Run  # torch loads only now: a mistake in the configuration has shown at once

    Run(cfg).train()


if __name__ == "__main__":
    sys.exit(main())
