"""The matches of a search as a contact sheet: each query beside its matches, by person, above and below a threshold."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from fusionreid.dataloading.image_files import open_image, read_file
from fusionreid.dataloading.records import printable
from fusionreid.engine.evaluation.names import cosine_text
from fusionreid.engine.evaluation.operating_point import Threshold
from fusionreid.engine.reporting.html import render
from fusionreid.files import atomic_write

PAGES = {".html", ".htm"}
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
THUMBNAIL = (128, 256)  # width, height in pixels that an image is fitted into
MOST_QUERIES = {**dict.fromkeys(PAGES, 500), **dict.fromkeys(PICTURES, 40)}  # on one sheet


class Shown(NamedTuple):
    """An image with what is known about it."""

    path: str
    name: str  # of the file, or of the track
    person: str | None
    camera: str | None
    images: int  # of a track, else 0
    cosine: float = 1.0  # to the query

    def thumbnail(self) -> Image.Image | None:
        """Return the image at most THUMBNAIL large, None if it cannot be read any more."""
        try:
            return ImageOps.contain(open_image(read_file(self.path)).convert("RGB"), THUMBNAIL)
        except Exception:  # decoders raise whatever a broken file leads them to
            return None

    @property
    def jpeg(self) -> str:
        """The thumbnail as JPEG in base64, empty if there is none."""
        if (picture := self.thumbnail()) is None:
            return ""
        file = BytesIO()
        picture.save(file, "JPEG", quality=85)
        return base64.b64encode(file.getvalue()).decode("ascii")


@dataclass
class Group:
    """The matches that show one person, the most alike first; without a name, those of whom nothing is known."""

    person: str | None
    matches: list[Shown] = field(default_factory=list)


class Row(NamedTuple):
    """A query with its matches; each person is a group, above the threshold if the best match is."""

    query: Shown
    above: list[Group]
    below: list[Group]


def write_sheet(path: Path, title: str, found: Sequence[Mapping[str, Any]], threshold: Threshold | None) -> int:
    """Draw matches, as `nearest` of the search returns them, to a page or a picture by the suffix of `path`.

    Return the number of queries drawn, which is the first of them where there are too many for one sheet.
    """
    drawn = found[: MOST_QUERIES[path.suffix.lower()]]
    rows = [row_of(line, threshold) for line in drawn]
    if path.suffix.lower() in PAGES:
        left_out = len(found) - len(drawn)
        page = render(
            "contact_sheet.html",
            title=title,
            rows=rows,
            threshold=threshold,
            left_out=left_out,
            cosine_text=cosine_text,
        )
        data = page.encode("utf-8", "backslashreplace")
    else:
        from fusionreid.engine.reporting.sheet_picture import draw

        file = BytesIO()
        draw(title, rows, threshold).save(file, PICTURES[path.suffix.lower()], quality=90, subsampling=0)
        data = file.getvalue()
    with atomic_write(path) as out:
        out.write(data)
    return len(drawn)


def row_of(line: Mapping[str, Any], threshold: Threshold | None) -> Row:
    """Group the matches of a query by person."""
    limit = -1.0 if threshold is None else threshold.cosine
    groups: dict[str | bool, Group] = {}  # by person; those of whom nothing is known by the side of the threshold
    for match in map(_shown, line["matches"]):
        key = match.cosine >= limit if match.person is None else match.person
        groups.setdefault(key, Group(match.person)).matches.append(match)
    above = [group for group in groups.values() if group.matches[0].cosine >= limit]
    below = [group for group in groups.values() if group.matches[0].cosine < limit]
    return Row(_shown({**line, "path": line["query"]}), above, below)


def _shown(entry: Mapping[str, Any]) -> Shown:
    track = entry.get("track")
    parts = Path(track).parts[-2:] if track else (Path(entry["path"]).name,)
    person, camera = (None if (name := entry.get(key)) is None else printable(name) for key in ("person", "camera"))
    name = printable("/".join(parts))
    if camera is not None and camera.isdecimal():  # a bare number under an image could mean anything
        camera = f"camera {camera}"
    return Shown(entry["path"], name, person, camera, entry.get("images", 0), entry.get("cosine", 1.0))
