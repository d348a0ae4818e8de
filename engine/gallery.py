"""Maintain a gallery: what is in it, names, removal, versions, an index, files for other programs.

`python engine/gallery.py ACTION GALLERY [options]`; `fusionreid embed --to` fills it, `fusionreid search` looks in it.
"""

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import arguments, command
from fusionreid.engine.arguments import Command

if TYPE_CHECKING:
    from fusionreid.engine.config import Config
    from fusionreid.engine.galleries.table import Gallery

FILTERS = "person", "camera", "track", "path", "since", "before"


class Action(NamedTuple):
    """What can be done to a gallery: the function, called as `work(gallery, where, **options)`, and its options."""

    work: Callable[..., None]
    help: str
    needs: Sequence[str] = ()
    takes: Sequence[str] = ()
    some_filter: bool = False  # to name the rows that it changes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(COMMAND, argv)


def gallery(_cfg: "Config", *, action: str, gallery: str, **options: Any) -> None:
    """Do one thing to a gallery."""
    from fusionreid.engine.galleries.table import Gallery, GalleryError, condition

    about, given = ACTIONS[action], {name: value for name, value in options.items() if value is not None}
    allowed = {*about.needs, *about.takes}
    for name in about.needs:
        if name not in given:
            raise GalleryError(f"gallery {action} needs {_option(name)}: {about.help}")
    if unfit := sorted(given.keys() - allowed):
        takes = ", ".join(map(_option, sorted(allowed))) or "no option"
        raise GalleryError(f"gallery {action} does not take {', '.join(map(_option, unfit))}; it takes {takes}")
    where = condition(**{name: given.pop(name) for name in FILTERS if name in given})
    if about.some_filter and not where:
        raise GalleryError(f"gallery {action} needs one of {', '.join(map(_option, FILTERS))}, which name the images")
    about.work(Gallery.open(gallery), where, **given)


def show_persons(gallery: "Gallery", where: str) -> None:
    """Print the persons of a gallery, with their images, cameras and times."""
    import pyarrow as pa

    from fusionreid.dataloading.records import printable

    batches = list(gallery.scan(("person", "camera", "time"), where))
    if not batches:
        print("no images")
        return
    measures: list[Any] = [("camera", "count_distinct"), ("time", "min"), ("time", "max"), ([], "count_all")]
    persons = pa.Table.from_batches(batches).group_by("person").aggregate(measures).sort_by("person")
    print(f"{'person':24}{'images':>10}{'cameras':>10}  first and last seen")
    for row in persons.to_pylist():
        times = (row["time_min"], row["time_max"])
        first, last = (f"{time:%Y-%m-%d %H:%M}" if time else "" for time in times)
        name = "unknown" if row["person"] is None else printable(row["person"])
        print(f"{name:24}{row['count_all']:>10,}{row['camera_count_distinct']:>10}  {first}  {last}")


def show_stats(gallery: "Gallery", _where: str) -> None:
    """Print the size of a gallery, its model, its versions and indexes."""
    stats = gallery.table.stats()
    pieces, megabytes = stats["fragment_stats"]["num_fragments"], stats["total_bytes"] / 1e6
    print(f"{len(gallery):,} images, {megabytes:,.1f} MB in {pieces} pieces")
    print(f"vectors of {gallery.width} components in {gallery.dtype}")
    print(f"model {gallery.model}, version {gallery.table.version}")
    for index in gallery.table.list_indices():
        print(f"index {index.index_type} on {index.columns[0]}: {index.num_indexed_rows:,} of its rows are in it")


def remove(gallery: "Gallery", where: str) -> None:
    """Remove images, until the next vacuum in such a way that they can be brought back."""
    version = gallery.table.version
    print(f"{gallery.remove(where):,} images removed; gallery checkout --to {version} brings them back until "
          "gallery vacuum --keep-days 0 deletes them for good")  # fmt: skip


def rename(gallery: "Gallery", where: str, to: str) -> None:
    """Give images a person's name."""
    version = gallery.table.version
    count = gallery.rename(where, to or None)
    print(f"{count:,} images are now of {to or 'nobody known'}; gallery checkout --to {version} undoes it")


def merge(gallery: "Gallery", _where: str, source: str) -> None:
    """Add the images of another gallery."""
    from fusionreid.engine.galleries.table import Gallery

    print(f"{gallery.merge(Gallery.open(source)):,} images added from {source}")


def checkout(gallery: "Gallery", _where: str, to: str = "") -> None:
    """Go back to a version, or list them."""
    from fusionreid.engine.galleries.table import GalleryError

    if not to:
        for change in gallery.changes():
            print(f"{change.version:6}  {change.time:%Y-%m-%d %H:%M:%S}  {change.rows:,} images")
        return
    if not to.isdecimal():
        raise GalleryError(f"--to must be the number of a version, got {to}: without --to, checkout lists them")
    gallery.restore(int(to))
    print(f"{gallery.place} is as in version {to}: {len(gallery):,} images")


def vacuum(gallery: "Gallery", _where: str, keep_days: float = 7.0) -> None:
    """Tidy up the files of a gallery."""
    gallery.vacuum(keep_days)
    show_stats(gallery, "")


def index(gallery: "Gallery", _where: str, kind: str = "ivf_pq") -> None:
    """Build an index, and print how much of the exact answer it finds."""
    from fusionreid.engine.galleries.find import build_index

    print(f"{kind} built; of the ten nearest images it finds {build_index(gallery, kind):.1%} (recall@10 on a sample)")


def export(gallery: "Gallery", where: str, to: str) -> None:
    """Write a file for other programs."""
    from fusionreid.engine.galleries.export import export

    print(f"wrote {', '.join(map(str, export(gallery, arguments.path(to), where)))}")


ACTIONS: Mapping[str, Action] = {
    "list": Action(show_persons, "persons, with the number of their images", takes=FILTERS),
    "stats": Action(show_stats, "rows, bytes, model, indexes"),
    "remove": Action(remove, "take images out", takes=FILTERS, some_filter=True),
    "rename": Action(rename, "give images a person's name", ["to"], FILTERS, some_filter=True),
    "merge": Action(merge, "add the images of another gallery of the same model", ["source"]),
    "checkout": Action(checkout, "list versions, or go back to one", takes=["to"]),
    "vacuum": Action(vacuum, "join small files, delete old versions", takes=["keep_days"]),
    "index": Action(index, "build an index for search --index", takes=["kind"]),
    "export": Action(export, "write .parquet, .npy or .faiss", ["to"], FILTERS),
}


def options(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    actions = "\n".join(f"{name}: {action.help}" for name, action in ACTIONS.items())
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help=actions)
    parser.add_argument("gallery", type=arguments.place, metavar="GALLERY",
                        help="the gallery, as in galleries/shop or s3://bucket/shop")  # fmt: skip
    for name in ("person", "camera", "track"):
        parser.add_argument(f"--{name}", metavar="NAME", help=f"images of this {name} only")
    parser.add_argument("--path", metavar="PATH", help="the image of this path only, as search prints it")
    parser.add_argument(
        "--since", type=arguments.time, metavar="TIME", help="images from this time on, as in 2026-03-01T18:30"
    )
    parser.add_argument(
        "--before", type=arguments.time, metavar="TIME", help="images before this time, as in 2026-03-01"
    )
    parser.add_argument("--to", metavar="WHAT",
                        help="rename: the person's new name, as in anna, or '' if it is not known; export: the file, "
                             "as in shop.parquet; checkout: the number of the version to go back to")  # fmt: skip
    parser.add_argument("--from", type=arguments.place, dest="source", metavar="GALLERY", help="merge: what to add")
    parser.add_argument("--keep-days", type=_days, metavar="N",
                        help="vacuum: delete versions older than so many days (default: 7); 0 deletes all but the "
                             "newest, while nobody else uses the gallery")  # fmt: skip
    parser.add_argument("--kind", choices=("ivf_pq", "hnsw"), help="index: its kind (default: ivf_pq)")


def _days(text: str) -> float:
    if not text.replace(".", "", 1).isdecimal():
        raise ArgumentTypeError(f"must be a number of days, got {text}")
    return float(text)


def _option(name: str) -> str:
    return "--from" if name == "source" else f"--{name.replace('_', '-')}"


COMMAND = Command(
    gallery,
    "list, name, remove, undo, export: maintain a gallery",
    "Maintain a gallery, which `fusionreid embed --to` fills and `fusionreid search` searches.",
    ["list galleries/shop", "rename galleries/shop --track 17 --to anna",
     "remove galleries/shop --before 2026-01-01"],
    options,
    needs_config=False,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
