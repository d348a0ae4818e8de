"""What a search compares: stored embeddings, or images that the model embeds; only some cameras; images or tracks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusionreid.dataloading.datasets.names import camera_key
from fusionreid.dataloading.image_files import find_images
from fusionreid.dataloading.image_list import Listed, is_list, read_image_list
from fusionreid.dataloading.records import DataError, Record, printable
from fusionreid.engine.arguments import evaluate_run
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.evaluation.embeddings import Embeddings
from fusionreid.engine.evaluation.finite import check_finite
from fusionreid.engine.evaluation.names import Names
from fusionreid.engine.evaluation.tracks import Tracks, pool, tracks_by_folder
from fusionreid.engine.galleries.table import Gallery, GalleryError, condition, is_gallery, needed

if TYPE_CHECKING:
    from fusionreid.engine.config import Config


def read_source(cfg: "Config", path: Path, *, tracks: bool) -> Embeddings | None:
    """Read stored embeddings, or embed the images at the path; a row per image, or per track. None: not the main rank.

    With `tracks`, images are pooled by the column track of a list, and elsewhere by their folders.
    """
    folder = embeddings.folder_at(path)
    if (folder / embeddings.INDEX).is_file():
        stored = embeddings.load(folder)
        check_finite(stored.features, stored.records)
        return tracks_by_folder(stored) if tracks else stored
    listed = _listed(path)
    if tracks and (without := [entry.path for entry in listed if not entry.track]):
        raise DataError(f"{printable(path)}: {len(without):,} of {len(listed):,} images have no track, the first is "
                        f"{printable(without[0])}; name it for all in a column track")  # fmt: skip
    from fusionreid.engine.evaluation.extract import embed_images  # loads what a model needs

    records, names = _records(listed)
    found = embed_images(cfg, path, records)
    if found is None:
        return None
    if listed:
        found = replace(found, source={**found.source, **names.as_source()})
    if not tracks:
        return found
    return _by_list(found, listed) if listed else tracks_by_folder(found)


def search_gallery(
    cfg: "Config", query: Path | str, place: str, count: int, at_least: float, *, index: bool, **filters: Any
) -> list[dict[str, Any]]:
    """Describe every query and its nearest rows of a gallery, images of one track as one match; as `nearest` does."""
    needed("lancedb", "gallery")
    from fusionreid.engine.galleries import find

    gallery = Gallery.open(place)
    asked, vectors = _asked(cfg, query, gallery, (filters.get("seen") or (None,))[0])
    search = find.indexed if index else find.exact
    found = search(gallery, vectors, count, condition(**filters))
    return [{**about, "matches": matches} for about, matches in zip(asked, find.matches(found, at_least))]


def _asked(
    cfg: "Config", query: Path | str, gallery: Gallery, camera: str | None
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Describe the queries, seen by a camera if it is known, and return their vectors of the gallery's model."""
    from fusionreid.engine.galleries.find import rows_of

    if is_gallery(query):
        rows, vectors = rows_of(Gallery.open(query, gallery.model))
        if not rows:
            raise GalleryError(f"{query} holds no images to search for: fusionreid embed IMAGES --to {query} adds some")
        return [{"query": row["path"], "person": row["person"], "camera": row["camera"]} for row in rows], vectors
    path = Path(query)
    if (embeddings.folder_at(path) / embeddings.INDEX).is_file():
        raise GalleryError(f"{printable(path)} does not say which model its vectors are of, as the query of a gallery "
                           "must: name its images, or embed them with --to")  # fmt: skip
    listed = _listed(path)
    images = [entry.path for entry in listed] or [record.path for record in find_images(path)]
    from fusionreid.engine.embedder import Embedder

    embedder = Embedder(cfg)
    Gallery.open(gallery.place, embedder.model_digest)
    vectors = embedder(images, camera if camera in embedder.cameras else None)
    return [{"query": image, "person": None, "camera": camera} for image in images], vectors


def _listed(path: Path) -> list[Listed]:
    """The entries of a list, none of other images; DataError for a run, whose images are charts and reports."""
    if (path / "checkpoints").is_dir():
        raise DataError(f"{printable(path)} is a run without stored vectors ({embeddings.INDEX} is no file in "
                        f"{printable(embeddings.folder_at(path))}), which training stores at its end: store those of "
                        f"its newest checkpoint with {evaluate_run(path)}, or name a folder or list of "
                        "images")  # fmt: skip
    return read_image_list(path) if path.is_file() and is_list(path) else []


def of_cameras(images: Embeddings, wanted: Sequence[str]) -> Embeddings:
    """Keep the images of the cameras of these names, in any usual spelling; of all cameras if there are none."""
    if not wanted:
        return images
    names = Names.from_source(images.source)
    known = {number: names.camera(number) for number in sorted({record.camera for record in images.records})}
    there = {number: name for number, name in known.items() if name is not None}
    if not there:
        raise DataError("--camera: the gallery does not say which camera took its images; a run does, and a "
                        "list with a column camera")  # fmt: skip
    chosen = set()
    for text in wanted:
        same = [n for n, name in there.items() if name == text] or [
            n for n, name in there.items() if camera_key(name) == camera_key(text)
        ]
        if not same:
            raise DataError(f"--camera {text}: the gallery has images of the cameras {', '.join(there.values())}")
        chosen.update(same)
    return _rows(images, [i for i, record in enumerate(images.records) if record.camera in chosen])


def describe(images: Embeddings) -> list[dict[str, Any]]:
    """Describe every row: path, person and camera by name or None, and of a track its name and number of images."""
    names = Names.from_source(images.source)
    rows = [
        {"path": record.path, "person": names.person(record.person), "camera": names.camera(record.camera)}
        for record in images.records
    ]
    if isinstance(images, Tracks):
        return [{**row, "track": t, "images": n} for row, t, n in zip(rows, images.tracks, images.sizes)]
    return rows


def _rows(images: Embeddings, rows: Sequence[int]) -> Embeddings:
    fields = ("records", "tracks", "sizes") if isinstance(images, Tracks) else ("records",)
    chosen: dict[str, Any] = {name: tuple(getattr(images, name)[i] for i in rows) for name in fields}
    return replace(images, features=images.features[list(rows)], num_query=0, **chosen)


def _records(listed: Sequence[Listed]) -> tuple[list[Record], Names]:
    """Number the persons and cameras of a list; -1 where it says none."""
    persons, cameras = ({name: i for i, name in enumerate(sorted({getattr(e, kind) for e in listed} - {""}))}
                        for kind in ("person", "camera"))  # fmt: skip
    records = [Record(entry.path, persons.get(entry.person, -1), cameras.get(entry.camera, -1)) for entry in listed]
    return records, Names(*({number: name for name, number in numbers.items()} for numbers in (persons, cameras)))


def _by_list(found: Embeddings, listed: Sequence[Listed]) -> Tracks:
    """Pool by the track that the list names; trackers number anew for every camera."""
    keys: dict[str, tuple[str, str]] = {}
    for entry in listed:
        key = entry.track, entry.camera
        if keys.setdefault(entry.path, key) != key:
            raise DataError(
                f"the list gives {printable(entry.path)} two tracks, {keys[entry.path][0]} and {entry.track}"
            )
    theirs = [keys[record.path] for record in found.records]
    return pool(found, theirs, [track for track, _ in theirs])
