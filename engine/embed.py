"""Embed images: those in a folder, and in the folders inside it, become rows of a file of features.

`python engine/embed.py --config_file FILE --images FOLDER --output FOLDER [KEY VALUE ...]`; the model is TEST.WEIGHT or
the newest checkpoint in OUTPUT_DIR. Cameras are unknown, so a model with camera embeddings uses their mean.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import arguments, command
from fusionreid.engine.arguments import Command, Ending, search_in

if TYPE_CHECKING:
    from fusionreid.engine.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(COMMAND, argv)


def embed(cfg: "Config", *, images: Path, output: Path) -> None:
    """Embed images into a folder of vectors."""
    from fusionreid.engine.distributed import parallel
    from fusionreid.engine.evaluation import embeddings
    from fusionreid.engine.evaluation.extract import embed_to_folder
    from fusionreid.engine.monitoring import memory

    folder = output.resolve()
    embeddings.check_place(folder)
    with memory.explained("evaluation", cfg):
        count = embed_to_folder(cfg, images, folder)
    if command.RANK == 0:
        print(f"{count} images: {output}")
    parallel.finish()


def options(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    what = "an image, or a folder with images in it or below it, as in crops/"
    where = "where the vectors and index.json go, as in log/crops; replaced if it holds embeddings"
    parser.add_argument("--images", required=True, type=arguments.path, metavar="PATH", help=what)
    parser.add_argument("--output", required=True, type=arguments.path, metavar="FOLDER", help=where)


def ending(_cfg: "Config", *, images: Path, output: Path) -> Ending:
    """Say what was written and what usually comes next."""
    return Ending([output], search_in(output))


COMMAND = Command(
    embed,
    "turn images into feature vectors",
    "Embed any images with the newest checkpoint in OUTPUT_DIR, or with TEST.WEIGHT.",
    ["--config_file my.yml --images crops --output log/crops"],
    options,
    ending=ending,
)

if __name__ == "__main__":
    sys.exit(main())
