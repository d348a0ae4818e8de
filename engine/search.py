"""The door of search: which gallery images look most like each query, by the cosine of their features.

`python engine/search.py --query Q --gallery G [--top 10] [--at-least COSINE] [--json FILE] [--config_file FILE]
[KEY VALUE ...]`; each of Q and G is a folder of embeddings, as evaluate and embed leave it, or an image or a folder of
images, for which the model of the configuration is needed. An evaluation with TEST.DETAILS says which cosine means the
same person.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.dataloading.records import DataError
from fusionreid.engine import command
from fusionreid.engine.config import Config

if TYPE_CHECKING:
    from fusionreid.engine.evaluation.embeddings import Embeddings

VECTOR = "FEAT", "NECK_FEAT", "FEAT_NORM", "FLIP"  # what of TEST decides a vector
log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    wanted = not {"-h", "--help"} & set(given)
    parser.add_argument("--query", required=wanted, type=Path)
    parser.add_argument("--gallery", required=wanted, type=Path)
    parser.add_argument("--top", default=10, type=int)
    parser.add_argument("--at-least", default=-1.0, type=float, metavar="COSINE")
    parser.add_argument("--json", type=Path)
    options, rest = parser.parse_known_args(given)
    if not any(word.startswith("--config_file") for word in rest):
        rest = ["--config_file", os.devnull, *rest]  # embeddings alone need no model

    def search(cfg: Config) -> None:
        from fusionreid.files import write_json

        _check(options)
        query, gallery = (_load_or_embed(cfg, path) for path in (options.query, options.gallery))
        if query is None or gallery is None:
            return  # the main rank has them
        _warn_of_two_models(query, gallery)
        found = nearest(query, gallery, options.top, options.at_least)
        for line in found:
            print(line["query"])
            for place, match in enumerate(line["matches"], 1):
                print(f"{place:6}  {match['cosine']:6.3f}  {match['path']}")
        if options.json:
            write_json(options.json, found)

    return command.run(search, rest)


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


def _check(options: argparse.Namespace) -> None:
    if options.top < 1:
        raise DataError(f"--top must be 1 or more, got {options.top}")
    if not -1 <= options.at_least <= 1:
        raise DataError(f"--at-least must be a cosine, from -1 to 1, got {options.at_least}")
    if options.json and (options.json.is_dir() or not os.access(options.json.absolute().parent, os.W_OK)):
        raise DataError(f"--json {options.json} cannot be written: name a file in a folder that is there")


def _warn_of_two_models(query: "Embeddings", gallery: "Embeddings") -> None:
    models = [(e.source.get("checkpoint"), *(e.source.get("TEST", {}).get(key) for key in VECTOR))
              for e in (query, gallery)]  # fmt: skip
    if models[0] != models[1]:
        names = "checkpoint", *(f"TEST.{key}" for key in VECTOR)
        differences = [f"{name} {a} and {b}" for name, a, b in zip(names, *models) if a != b]
        log.warning("query and gallery were embedded differently, their cosines mean little: %s",
                    ", ".join(differences))  # fmt: skip


def _load_or_embed(cfg: Config, path: Path) -> "Embeddings | None":
    from fusionreid.engine.evaluation import embeddings
    from fusionreid.engine.evaluation.extract import check_finite, embed_images

    if not (path / embeddings.INDEX).is_file():
        return embed_images(cfg, path)
    stored = embeddings.load(path)
    check_finite(stored.features, stored.records)
    return stored


if __name__ == "__main__":
    sys.exit(main())
