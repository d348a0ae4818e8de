"""Export a trained model as one file that runs without this code, checked against the model it is from.

`python engine/export.py --config_file FILE --output model.onnx [KEY VALUE ...]` writes ONNX, for ONNX Runtime, TensorRT
and others; a name that ends in .pt2 is a program for `torch.export.load`. The model is TEST.WEIGHT or the newest
checkpoint in OUTPUT_DIR; the vector is the one that TEST describes, in fp32. Beside it, a file of the same name with
.json says what goes in, what comes out, and how far it was off when it was checked.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import arguments, command
from fusionreid.engine.arguments import Command, Ending

if TYPE_CHECKING:
    from fusionreid.engine.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(COMMAND, argv)


def export(cfg: "Config", *, output: Path, precision: str) -> None:
    """Write the model as one file that runs without this project."""
    from fusionreid.engine.exporter import export_model

    export_model(cfg, output, precision)


def options(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    which = "the file to write: model.onnx for ONNX Runtime and others, model.pt2 for torch.export.load"
    parser.add_argument("--output", required=True, type=arguments.path, metavar="FILE", help=which)
    what = "fp16 or int8 in ONNX; the loss of accuracy is measured on the test set (default: fp32)"
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32", help=what)


def ending(_cfg: "Config", *, output: Path, **_: object) -> Ending:
    """Say what was written and what usually comes next."""
    runner = "onnxruntime.InferenceSession" if output.suffix == ".onnx" else "torch.export.load"
    return Ending([output, f"{output}.json"], f"load it with {runner}; the .json beside it lists inputs and outputs")


COMMAND = Command(
    export,
    "write a model as one ONNX or torch.export file",
    "Write the newest checkpoint in OUTPUT_DIR, or TEST.WEIGHT, as one file that runs without this code.\n"
    "It is checked against the model on three batches and deleted if they differ.",
    ["--config_file my.yml --output model.onnx", "--config_file my.yml --output small.onnx --precision int8"],
    options,
    ending=ending,
)

if __name__ == "__main__":
    sys.exit(main())
