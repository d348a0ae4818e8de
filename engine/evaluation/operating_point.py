"""The cosine from which on two images show one person, as an evaluation measured it."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fusionreid.engine.evaluation.embeddings import Embeddings
from fusionreid.engine.evaluation.names import cosine_text
from fusionreid.sealed import unseal

RATE = 1e-3  # of false positives that is shown, or the nearest measured
VECTOR = "FEAT", "NECK_FEAT", "FEAT_NORM", "FLIP"  # what of TEST decides a vector
METRICS = "metrics.json"
log = logging.getLogger(__name__)


class Threshold(NamedTuple):
    """A cosine, and the shares of the pairs of one person and of two that reach it, if they were measured."""

    cosine: float
    true_positive_rate: float = math.nan
    false_positive_rate: float = math.nan

    @property
    def words(self) -> str:
        """What the threshold means, in plain words."""
        if math.isnan(self.true_positive_rate):
            return f"cosine {cosine_text(self.cosine)}, as asked for"
        found, rarity = 100 * self.true_positive_rate, 1 / self.false_positive_rate
        return (
            f"cosine {cosine_text(self.cosine)}: in the evaluation, {found:.0f} % of the pairs of one person reach it, "
            f"and 1 in {rarity:,.0f} of the pairs of two persons"
        )


def how_embedded(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a vector: the checkpoint, and settings by their names."""
    test = source.get("TEST")
    settings = test if isinstance(test, dict) else {}
    return {"checkpoint": source.get("checkpoint"), **{f"TEST.{key}": settings.get(key) for key in VECTOR}}


def measured_threshold(gallery: Embeddings, path: Path) -> Threshold | None:
    """Find the threshold for vectors as the gallery has them, in the folder `path` or in the run of its checkpoint."""
    checkpoint = gallery.source.get("checkpoint")
    runs = [path, path.parent, *(list(Path(checkpoint).parents[1:2]) if isinstance(checkpoint, str) else [])]
    for run in runs:
        try:
            metrics = unseal(run / METRICS, required=False)
            if how_embedded(metrics) == how_embedded(gallery.source):
                points = [
                    Threshold(*(float(point[key]) for key in Threshold._fields))
                    for point in metrics.get("thresholds", [])
                ]
                if points:
                    return min(points, key=lambda point: abs(math.log(point.false_positive_rate / RATE)))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            log.warning("%s tells no threshold: %s", run / METRICS, error)
    return None
