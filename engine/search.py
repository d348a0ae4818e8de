"""Search a gallery: which of its images look most like each query, by the cosine of their features.

`python engine/search.py --query Q --gallery G [--top 10] [--at-least COSINE] [--camera NAME] [--tracks] [--json FILE]
[--picture FILE] [--config_file FILE] [KEY VALUE ...]`; each of Q and G is a folder of embeddings, as embed writes it,
or a run that was trained or evaluated, an image, a folder of images or a list of them, for which the model of the
configuration is needed. An evaluation says which cosine means the same person.
"""

import logging
import sys
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
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

SHEETS = ".html", ".htm", ".png", ".jpg", ".jpeg"
log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(COMMAND, argv)


def search(
    cfg: "Config",
    *,
    query: str,
    gallery: str,
    top: int,
    at_least: float | None,
    camera: list[str],
    tracks: bool,
    json: Path | None,
    picture: Path | None,
    **of_gallery: Any,
) -> None:
    """Print the gallery images, or tracks, nearest to each query."""
    from fusionreid.dataloading.records import printable
    from fusionreid.engine.evaluation.names import cosine_text
    from fusionreid.engine.evaluation.operating_point import Threshold, measured_threshold
    from fusionreid.engine.galleries.table import GalleryError, is_gallery
    from fusionreid.engine.search_sources import of_cameras, read_source, search_gallery
    from fusionreid.files import write_json

    among, limit = None, -1.0 if at_least is None else at_least
    if is_gallery(gallery):
        if tracks:
            raise GalleryError("--tracks is for folders and lists: a gallery shows the images of a track as one match")
        found = search_gallery(cfg, query, gallery, top, limit, camera=camera, **of_gallery)
    else:
        if given := [name for name, value in of_gallery.items() if value]:
            raise GalleryError(f"--{given[0]} is for a gallery that embed --to has made, which {gallery} is not")
        asked, among = (read_source(cfg, Path(path), tracks=tracks) for path in (query, gallery))
        if asked is None or among is None:
            return  # the main rank has them
        among = of_cameras(among, camera)
        _warn_of_two_models(asked, among)
        found = nearest(asked, among, top, limit)
    for line in found:
        print(printable(_named(line, line["query"])))
        if not line["matches"]:
            print(f"        nobody{f' at or above {limit}' if at_least is not None else ''}")
        for place, match in enumerate(line["matches"], 1):
            print(f"{place:6}  {cosine_text(match['cosine']):>7}  {printable(_named(match, match['path']))}")
    threshold = None if at_least is None else Threshold(at_least)
    if threshold is None and not tracks:  # a track's vector is a mean, and more like others than those measured
        threshold = measured_threshold(among, Path(gallery)) if among is not None else None
        log.info("%s", threshold.words if threshold else f"which cosine means the same person is not known: "
                 f"{command_line('evaluate')} measures it")  # fmt: skip
    if json:
        write_json(json, found)
    if picture:
        from fusionreid.engine.reporting.contact_sheet import write_sheet

        count = write_sheet(picture, f"Search in {printable(gallery)}", found, threshold)
        if count < len(found):
            log.warning("%s shows the first %d of %d queries", picture, count, len(found))


def options(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    kinds = "an image, a folder or a CSV list of images, what embed has written, or a run"
    parser.add_argument("--query", required=True, type=arguments.place, metavar="PATH",
                        help=f"whom to look for: {kinds}; as in lost.jpg")  # fmt: skip
    parser.add_argument("--gallery", required=True, type=arguments.place, metavar="PATH",
                        help="where to look: any of the same, as in log/own")  # fmt: skip
    parser.add_argument("--top", default=10, type=_count, metavar="N", help="matches per query, as in 5 (default: 10)")
    parser.add_argument("--at-least", type=_cosine, metavar="COSINE",
                        help="show no match below this cosine, as in 0.62 (default: show all)")  # fmt: skip
    parser.add_argument("--camera", action="append", default=[], metavar="NAME",
                        help="look only at images of this camera, as in hall; may be given again")  # fmt: skip
    parser.add_argument("--tracks", action="store_true",
                        help="compare tracks by the mean of their vectors: the images of a folder, or those that the "
                             "column track of a list joins")  # fmt: skip
    growing = parser.add_argument_group("in a gallery that embed --to has made")
    growing.add_argument("--person", metavar="NAME", help="look only at images of this person, as in anna")
    growing.add_argument(
        "--since", type=arguments.time, metavar="TIME", help="from this time on, as in 2026-03-01T18:30"
    )
    growing.add_argument("--before", type=arguments.time, metavar="TIME", help="before this time, as in 2026-03-02")
    growing.add_argument("--seen", nargs=2, metavar=("CAMERA", "TIME"), action=_Seen,
                         help="where and when the query was seen: leave out that camera within a minute")  # fmt: skip
    growing.add_argument("--index", action="store_true",
                         help="use the index that gallery index has built: faster, and may miss some")  # fmt: skip
    parser.add_argument("--picture", type=_sheet, metavar="FILE",
                        help="also draw a contact sheet, as in found.html, .png or .jpg")  # fmt: skip
    parser.add_argument(
        "--json",
        type=arguments.file_to_write,
        metavar="FILE",
        help="also write the matches to a file, as in found.json",
    )


def ending(_cfg: "Config", *, json: Path | None, picture: Path | None, **_: object) -> Ending:
    """Say what was written."""
    return Ending([file for file in (json, picture) if file])


def nearest(query: "Embeddings", gallery: "Embeddings", count: int, at_least: float = -1.0) -> list[dict[str, Any]]:
    """Describe every query and its nearest gallery images of a cosine of at least so much, the first one first."""
    from fusionreid.engine.evaluation.embeddings import EmbeddingsError
    from fusionreid.engine.search_sources import describe
    from fusionreid.kernels import nearest_neighbours

    widths = query.features.shape[1], gallery.features.shape[1]
    if widths[0] != widths[1]:
        raise EmbeddingsError(
            f"the query has features {widths[0]} wide, the gallery {widths[1]}: they are of two models"
        )
    near = nearest_neighbours(query.features, gallery.features, min(count, len(gallery.records)), normalize=True)
    asked, known = describe(query), describe(gallery)
    return [
        {"query": about.pop("path"), **about, "matches": [
            {**known[i], "cosine": 1 - distance / 2}
            for i, distance in zip(indices, distances) if 1 - distance / 2 >= at_least]}
        for about, indices, distances in zip(asked, near.indices.tolist(), near.distances.tolist())
    ]  # fmt: skip


def _named(entry: dict[str, Any], path: str) -> str:
    """Name an image or a track in a line of text, with its person and camera if they are known."""
    images = f"{(count := entry.get('images', 0))} image{'' if count == 1 else 's'}"
    name = f"{entry['track']} ({images})" if "track" in entry else path
    known = ", ".join(entry[key] for key in ("person", "camera") if entry.get(key) is not None)
    return f"{name}  {known}" if known else name


def _warn_of_two_models(query: "Embeddings", gallery: "Embeddings") -> None:
    from fusionreid.engine.evaluation.operating_point import how_embedded

    asked, known = how_embedded(query.source), how_embedded(gallery.source)
    if differences := [f"{name} {value} and {known[name]}" for name, value in asked.items() if value != known[name]]:
        log.warning("query and gallery were embedded differently, their cosines mean little: %s",
                    ", ".join(differences))  # fmt: skip


class _Seen(Action):
    """A camera and a time."""

    def __call__(self, parser: ArgumentParser, given: Namespace, values: Any, _option: str | None = None) -> None:
        try:
            given.seen = values[0], arguments.time(values[1])
        except ArgumentTypeError as error:
            parser.error(f"argument --seen: TIME {error}")


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


def _sheet(text: str) -> Path:
    if not text.lower().endswith(SHEETS):
        raise ArgumentTypeError(f"{text} must end in {', '.join(SHEETS[:-1])} or {SHEETS[-1]}")
    return arguments.file_to_write(text)


COMMAND = Command(
    search,
    "find the gallery images that look most like each query",
    "Rank gallery images by the cosine of their features to each query. Stored embeddings need no configuration;\n"
    "images are embedded by the model that --config_file names.",
    ["--query log/lost --gallery log/own --top 5",
     "--query lost.jpg --gallery log/crops --at-least 0.62 --picture found.html --config_file my.yml"],
    options,
    needs_config=False,
    ending=ending,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
