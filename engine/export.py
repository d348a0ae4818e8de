"""The door of export: a trained model as one file that runs without this code, checked against the model it is from.

`python engine/export.py --config_file FILE --output model.onnx [KEY VALUE ...]` writes ONNX, for ONNX Runtime, TensorRT
and others; a name that ends in .pt2 is a program for `torch.export.load`. The model is TEST.WEIGHT or the newest
checkpoint in OUTPUT_DIR; the vector is the one that TEST describes, in fp32. Beside it, a file of the same name with
.json says what goes in, what comes out, and how far it was off when it was checked.
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
    wanted = not {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv)
    parser.add_argument("--output", required=wanted, type=Path)
    options, rest = parser.parse_known_args(argv)

    def export(cfg: Config) -> None:
        from fusionreid.engine.exporter import export_model

        export_model(cfg, options.output)

    return command.run(export, rest)


if __name__ == "__main__":
    sys.exit(main())
