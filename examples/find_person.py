"""Find the images that show a person, or nobody: only images above the threshold that the run's evaluation measured.

    python examples/find_person.py log/shop lost.jpg crops

Without enough test persons no threshold was measured, and the search says so.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fusionreid import Embedder


def threshold(run: Path, false_positive_rate: float = 1e-3) -> float:
    """Return the cosine that this share of the pairs of two persons reached in the run's evaluation, or the nearest."""
    points = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["thresholds"]
    if not points:
        sys.exit(f"{run}: the evaluation had too few pairs of two persons to measure a threshold")
    nearest = min(points, key=lambda point: abs(point["false_positive_rate"] - false_positive_rate))
    return float(nearest["cosine"])


def find(embedder: Embedder, query: Path, gallery: Sequence[Path], at_least: float) -> Iterator[tuple[float, Path]]:
    """Yield cosine and path of the gallery images that are at least so similar to the query, the most similar first."""
    cosines = embedder(gallery) @ embedder(query)[0]
    for i in np.argsort(-cosines, kind="stable"):
        if cosines[i] >= at_least:
            yield float(cosines[i]), gallery[i]


if __name__ == "__main__":
    run, query, folder = map(Path, sys.argv[1:])
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    found = list(find(Embedder(run), query, images, threshold(run)))
    print(*(f"{cosine:.3f}  {path}" for cosine, path in found), sep="\n")
    print(f"{len(found)} of {len(images)} images")
