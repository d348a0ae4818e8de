"""The queries that a report shows: best, median and worst, each with its nearest gallery images and where it looks.

They are kept in queries.json beside metrics.json, small pictures included, so that a report can be drawn again without
the images.
"""

import base64
from collections import Counter
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from fusionreid.dataloading.records import Record, Split, printable
from fusionreid.engine.evaluation.names import Names

THUMBNAIL = (96, 192)  # width, height in pixels that a picture fits in
EACH = 2  # queries shown of the best, the median and the worst
SHOWN_QUERIES = 3 * EACH
SHOWN_IMAGES = 10  # of the gallery, per query
SHOWN_CONFUSIONS = 10
DARKEST = 0.25  # share of the light that is left where a map is 0

Maps = Mapping[str, Tensor]  # what a map shows -> maps (n, h, w), one per shown query


def person_name(names: Names, number: int) -> str:
    """Name a person; 0 is a distractor, whom no query shows."""
    name = printable(names.person(number) or "")
    return name if number else f"{name} (distractor)"


def camera_name(names: Names, number: int) -> str:
    """Name a camera."""
    return printable(names.camera(number) or "")


def choose_queries(average_precision: np.ndarray, each: int = EACH) -> dict[int, str]:
    """Choose the best, the median and the worst queries by average precision (Q,): index -> which of the three.

    A query without a match has NaN and is never chosen; of few queries each is chosen once.
    """
    order = np.argsort(-average_precision, kind="stable")
    order = order[np.isfinite(average_precision[order])]
    middle = max(0, (len(order) - each) // 2)
    kinds = {"best": order[:each], "median": order[middle : middle + each], "worst": order[-each:]}
    chosen: dict[int, str] = {}
    for kind in ("best", "worst", "median"):
        chosen |= {int(i): kind for i in kinds[kind] if int(i) not in chosen}
    return dict(sorted(chosen.items(), key=lambda item: -average_precision[item[0]]))


def describe_queries(
    split: Split, chosen: Mapping[int, str], precision: np.ndarray, nearest: np.ndarray, scores: np.ndarray, maps: Maps
) -> list[dict[str, Any]]:
    """Describe the chosen queries for queries.json.

    `nearest` and `scores` are (Q, k), nearest first: gallery indices, -1 past the end, and the cosine or distance.
    """
    names, described = Names.of(split), []
    for place, (i, kind) in enumerate(chosen.items()):
        query = split.query[i]
        found = [
            {
                **_shown(split.gallery[j], names),
                "score": round(float(score), 6),
                "right": split.gallery[j].person == query.person,
            }
            for j, score in zip(nearest[i].tolist(), scores[i].tolist())
            if j >= 0
        ]
        picture = thumbnail(query)
        lit = {what: encoded(light(picture, of_query[place].numpy())) for what, of_query in maps.items()}
        own = {**_shown(query, names), "kind": kind, "average_precision": float(precision[i])}
        described.append({**own, "maps": lit, "found": found})
    return described


def confusions(split: Split, nearest: np.ndarray) -> list[dict[str, Any]]:
    """List the persons whose queries find another person first, the most frequent first; `nearest` is (Q, k)."""
    names, asked = Names.of(split), Counter(record.person for record in split.query)
    wrong: Counter[tuple[int, int]] = Counter()
    for query, first in zip(split.query, nearest[:, 0].tolist()):
        if first >= 0 and split.gallery[first].person != query.person:
            wrong[query.person, split.gallery[first].person] += 1
    return [
        {"person": person_name(names, a), "taken_for": person_name(names, b), "queries": count, "of": asked[a]}
        for (a, b), count in wrong.most_common(SHOWN_CONFUSIONS)
    ]


def _shown(record: Record, names: Names) -> dict[str, str]:
    person, camera = person_name(names, record.person), camera_name(names, record.camera)
    return {"person": person, "camera": camera, "picture": encoded(thumbnail(record))}


def thumbnail(record: Record) -> Image.Image:
    """Make a small picture of an image, in its own proportions."""
    with Image.open(record.path) as file:
        return ImageOps.contain(file.convert("RGB"), THUMBNAIL, Image.Resampling.BICUBIC)


def encoded(picture: Image.Image) -> str:
    """Encode a picture as a JPEG file in base64."""
    file = BytesIO()
    picture.save(file, "JPEG", quality=88)
    return base64.b64encode(file.getvalue()).decode("ascii")


def light(picture: Image.Image, strength: np.ndarray) -> Image.Image:
    """Light a picture where a map (h, w), at least 0, is largest, and darken it where it is 0."""
    share = strength.astype(np.float32) / max(float(strength.max()), 1e-12)
    factor = np.asarray(Image.fromarray(share).resize(picture.size, Image.Resampling.BILINEAR))[:, :, None]
    return Image.fromarray((np.asarray(picture) * (DARKEST + (1 - DARKEST) * factor)).round().astype(np.uint8))
