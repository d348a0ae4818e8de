"""The installed command: `fusionreid train|evaluate|embed|search ...`, the same doors as the scripts."""

import sys
from importlib import import_module

DOORS = "train", "evaluate", "embed", "search", "export", "report", "doctor"
COMMANDS = {name: f"fusionreid.engine.{name}" for name in DOORS}


def main() -> int:
    command, *argv = sys.argv[1:] or ["--help"]
    if command not in COMMANDS:
        print(f"usage: fusionreid {{{','.join(COMMANDS)}}} --config_file FILE [KEY VALUE ...]", file=sys.stderr)
        return 0 if command in ("-h", "--help") else 2
    sys.argv[0] = f"fusionreid {command}"
    code: int = import_module(COMMANDS[command]).main(argv)
    return code
