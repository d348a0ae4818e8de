"""The door of embedding: the images in a folder, and in the folders inside it, become rows of a file of features.

`python engine/embed.py --config_file FILE --images FOLDER --output FOLDER [KEY VALUE ...]`; the model is TEST.WEIGHT or
the best checkpoint in OUTPUT_DIR. Cameras are unknown, so a model with camera embeddings uses their mean.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataloading.records import DataError, Record, list_images, shown
from engine import door
from engine.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    wanted = not {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv)
    parser.add_argument("--images", required=wanted, type=Path)
    parser.add_argument("--output", required=wanted, type=Path)
    options, rest = parser.parse_known_args(argv)

    def embed(cfg: Config) -> None:
        from engine import embeddings, parallel
        from engine.search import embed_images

        found = embed_images(cfg, options.images, options.output)
        if found is not None:
            embeddings.finish(options.output, found.features, found.records, 0, found.source)
            print(f"{len(found.records)} images: {options.output}")
        parallel.finish()

    return door.run(embed, rest)


def find_images(path: Path) -> tuple[Record, ...]:
    """One image, or all in a folder and the folders inside it, sorted; person and camera are not known."""
    if path.is_file():
        paths = [str(path.absolute())]
    else:
        paths = [image for folder, _, _ in os.walk(path.absolute()) for image in list_images(folder)[0]]
    if not paths:
        raise DataError(f"{shown(path)} holds no images; name an image, or a folder with some in it or below it")
    return tuple(Record(image, -1, -1) for image in sorted(paths))


if __name__ == "__main__":
    sys.exit(main())
