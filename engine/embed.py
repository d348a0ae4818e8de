"""Embed images: those in a folder, and in the folders inside it, become vectors.

`python engine/embed.py --config_file FILE --images FOLDER --output FOLDER [KEY VALUE ...]`; the model is TEST.WEIGHT or
the newest checkpoint in OUTPUT_DIR. Cameras are unknown, so a model with camera embeddings uses their mean. `--to` in
place of `--output` adds them to a gallery.
"""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import arguments, command
from fusionreid.engine.arguments import Command, Ending, search_in
from fusionreid.errors import ReIDError

if TYPE_CHECKING:
    from fusionreid.engine.config import Config

ABOUT = "person", "camera", "track"  # of an image in a gallery


class GivenError(ReIDError, ValueError):
    """Options that do not go together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(COMMAND, argv)


def embed(cfg: "Config", *, images: str, output: Path | None, to: str | None, **of_gallery: str | None) -> None:
    """Embed images into a folder of vectors, or into a gallery."""
    given = {name: value for name, value in of_gallery.items() if value is not None}
    if to is not None:
        embed_to_gallery(cfg, images, to, given)
        return
    if given:
        raise GivenError(f"--{next(iter(given))} is for a gallery: name one with --to in place of --output")
    from fusionreid.engine.distributed import parallel
    from fusionreid.engine.evaluation import embeddings
    from fusionreid.engine.evaluation.extract import embed_to_folder
    from fusionreid.engine.monitoring import memory

    assert output is not None  # since one of the two is needed
    folder = output.resolve()
    embeddings.check_place(folder)
    with memory.explained("evaluation", cfg):
        count = embed_to_folder(cfg, Path(images), folder)
    if command.RANK == 0:
        print(f"{count} images: {output}")
    parallel.finish()


def embed_to_gallery(cfg: "Config", images: str, to: str, given: dict[str, str]) -> None:
    """Add images to a gallery, in this process or on a Ray cluster."""
    from fusionreid.engine.galleries.table import needed

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise GivenError("--to runs in one process, not under torchrun: --ray auto uses all GPUs of this machine")
    needed("lancedb", "gallery")
    from fusionreid.engine.galleries.adding import add

    about = {name: given[name] for name in ABOUT if name in given}
    done = add(cfg, images, to, dtype=given.get("dtype", ""), given=about, ray=given.get("ray", ""))
    print(f"{done.added:,} images added to {to}; {done.known:,} were there, {len(done.faults):,} cannot be used")


def options(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    what = (
        "an image, or a folder with images in it or below it, as in crops/; with --to also a .csv or .parquet list, or "
        "a .tar shard of WebDataset"
    )
    where = "where the vectors and index.json go, as in log/crops; replaced if it holds embeddings"
    parser.add_argument("--images", required=True, type=arguments.place, metavar="PATH", help=what)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=arguments.path, metavar="FOLDER", help=where)
    target.add_argument("--to", type=arguments.place, metavar="GALLERY",
                        help="the gallery to add new images to, as in galleries/shop or "
                             "s3://bucket/shop")  # fmt: skip
    for name in ABOUT:
        parser.add_argument(f"--{name}", metavar="NAME", help=f"the {name} of all images, where a list names none")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), help="of vectors in a new gallery (default: fp16)")
    parser.add_argument("--ray", metavar="ADDRESS", help="embed on a Ray cluster; auto: the one there, or a local one")


def ending(_cfg: "Config", *, output: Path | None, to: str | None, **_: object) -> Ending:
    """Say what was written and what usually comes next."""
    where = output or to or ""
    return Ending([where], search_in(where))


COMMAND = Command(
    embed,
    "turn images into feature vectors",
    "Embed any images with the newest checkpoint in OUTPUT_DIR, or with TEST.WEIGHT.",
    [
        "--config_file my.yml --images crops --output log/crops",
        "--config_file my.yml --images crops/today --camera hall --to galleries/shop",
    ],
    options,
    ending=ending,
)

if __name__ == "__main__":
    sys.exit(main())
