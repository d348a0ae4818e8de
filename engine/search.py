"""Search a gallery: which of its images look most like each query, by the cosine of their features.

`python engine/search.py --query Q --gallery G [--top 10] [--at-least COSINE] [--json FILE] [--config_file FILE]
[KEY VALUE ...]`; each of Q and G is a folder of embeddings, as embed writes it, or a run that was evaluated, an image
or a folder of images, for which the model of the configuration is needed. An evaluation with TEST.DETAILS says which
cosine means the same person.
"""

import logging
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import arguments, command
from fusionreid.engine.arguments import Command, Ending, command_line

if TYPE_CHECKING:
    from fusionreid.engine.config import Config
    from fusionreid.engine.evaluation.embeddings import Embeddings

VECTOR = "FEAT", "NECK_FEAT", "FEAT_NORM", "FLIP"  # what of TEST decides a vector
log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(COMMAND, argv)


def search(cfg: "Config", *, query: Path, gallery: Path, top: int, at_least: float, json: Path | None) -> None:
    """Print the gallery images nearest to each query."""
    from fusionreid.dataloading.records import printable
    from fusionreid.files import write_json

    asked, among = (_load_or_embed(cfg, path) for path in (query, gallery))
    if asked is None or among is None:
        return  # the main rank has them
    _warn_of_two_models(asked, among)
    found = nearest(asked, among, top, at_least)
    for line in found:
        print(printable(line["query"]))
        for place, match in enumerate(line["matches"], 1):
            print(f"{place:6}  {match['cosine']:6.3f}  {printable(match['path'])}")
    if json:
        write_json(json, found)


def options(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    kinds = "an image, a folder of images, a folder of embeddings as embed writes it, or an evaluated run"
    parser.add_argument("--query", required=True, type=arguments.path, metavar="PATH",
                        help=f"whom to look for: {kinds}; as in lost.jpg")  # fmt: skip
    parser.add_argument("--gallery", required=True, type=arguments.path, metavar="PATH",
                        help="where to look, likewise; as in log/own")  # fmt: skip
    parser.add_argument("--top", default=10, type=_count, metavar="N", help="matches per query, as in 5 (default: 10)")
    parser.add_argument("--at-least", default=-1.0, type=_cosine, metavar="COSINE",
                        help="show no match below this cosine, as in 0.62 (default: show all)")  # fmt: skip
    parser.add_argument("--json", type=_file, metavar="FILE", help="also write the matches to a file, as in found.json")


def ending(_cfg: "Config", *, json: Path | None, **_: object) -> Ending:
    """Say what was written and what usually comes next."""
    tip = f"{command_line('evaluate')} --config_file FILE TEST.DETAILS yes tells from which cosine on two images show "
    return Ending([json] if json else [], f"{tip}one person")


def nearest(query: "Embeddings", gallery: "Embeddings", count: int, at_least: float = -1.0) -> list[dict[str, Any]]:
    """For every query its path and its nearest gallery images of a cosine of at least so much, the first one first."""
    from fusionreid.engine.evaluation.embeddings import EmbeddingsError
    from fusionreid.kernels import nearest_neighbours

    widths = query.features.shape[1], gallery.features.shape[1]
    if widths[0] != widths[1]:
        raise EmbeddingsError(
            f"the query has features {widths[0]} wide, the gallery {widths[1]}: they are of two models"
        )
    near = nearest_neighbours(query.features, gallery.features, min(count, len(gallery.records)), normalize=True)
    return [
        {"query": record.path, "matches": [
            {"path": gallery.records[i].path, "person": gallery.records[i].person, "camera": gallery.records[i].camera,
             "cosine": 1 - distance / 2} for i, distance in zip(indices, distances) if 1 - distance / 2 >= at_least]}
        for record, indices, distances in zip(query.records, near.indices.tolist(), near.distances.tolist())
    ]  # fmt: skip


def _warn_of_two_models(query: "Embeddings", gallery: "Embeddings") -> None:
    models = [(e.source.get("checkpoint"), *(e.source.get("TEST", {}).get(key) for key in VECTOR))
              for e in (query, gallery)]  # fmt: skip
    if models[0] != models[1]:
        names = "checkpoint", *(f"TEST.{key}" for key in VECTOR)
        differences = [f"{name} {a} and {b}" for name, a, b in zip(names, *models) if a != b]
        log.warning("query and gallery were embedded differently, their cosines mean little: %s",
                    ", ".join(differences))  # fmt: skip


def _load_or_embed(cfg: "Config", path: Path) -> "Embeddings | None":
    from fusionreid.engine.evaluation import embeddings
    from fusionreid.engine.evaluation.finite import check_finite

    folder = embeddings.folder_at(path)
    if (folder / embeddings.INDEX).is_file():
        stored = embeddings.load(folder)
        check_finite(stored.features, stored.records)
        return stored
    from fusionreid.engine.evaluation.extract import embed_images  # loads what a model needs

    return embed_images(cfg, path)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def _cosine(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -1 <= value <= 1:
        raise ArgumentTypeError(f"must be a cosine, from -1 to 1, got {text}")
    return value


def _file(text: str) -> Path:
    path = arguments.path(text)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ArgumentTypeError(f"{text} cannot be written: name a file in a folder that is there")
    return path


COMMAND = Command(
    search,
    "find the gallery images that look most like each query",
    "Rank gallery images by the cosine of their features to each query. Stored embeddings need no configuration;\n"
    "images are embedded by the model that --config_file names.",
    ["--query log/lost --gallery log/own --top 5",
     "--query lost.jpg --gallery log/crops --at-least 0.62 --config_file my.yml"],
    options,
    needs_config=False,
    ending=ending,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
