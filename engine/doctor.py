"""The door of the examination: what would stop a training, found without starting one.

`python engine/doctor.py --config_file FILE [--decode] [KEY VALUE ...]`
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import command
from fusionreid.engine.config import Config


def main(argv: list[str] | None = None) -> int:
    return command.run(doctor, argv, flags={"--decode": "decode every image file whole, in parallel"})


def doctor(cfg: Config, *, decode: bool = False) -> None:
    from fusionreid.engine.preflight import examine

    examine(cfg, decode=decode)


if __name__ == "__main__":
    sys.exit(main())
