"""The door of embedding: the images in a folder, and in the folders inside it, become rows of a file of features.

`python engine/embed.py --config_file FILE --images FOLDER --output FOLDER [KEY VALUE ...]`; the model is TEST.WEIGHT or
the newest checkpoint in OUTPUT_DIR. Cameras are unknown, so a model with camera embeddings uses their mean.
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
    parser.add_argument("--images", required=wanted, type=Path)
    parser.add_argument("--output", required=wanted, type=Path)
    options, rest = parser.parse_known_args(argv)

    def embed(cfg: Config) -> None:
        from fusionreid.engine.distributed import parallel
        from fusionreid.engine.evaluation import embeddings
        from fusionreid.engine.evaluation.extract import embed_to_folder

        output = options.output.resolve()
        embeddings.check_place(output)
        count = embed_to_folder(cfg, options.images, output)
        if command.RANK == 0:
            print(f"{count} images: {options.output}")
        parallel.finish()

    return command.run(embed, rest)


if __name__ == "__main__":
    sys.exit(main())
