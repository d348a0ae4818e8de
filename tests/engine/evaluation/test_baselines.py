"""The colour baseline: what it measures, and how far it gets where look-alikes and cameras stand in its way."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusionreid.dataloading import Record, read_split
from fusionreid.dataloading.config import DatasetsConfig, SyntheticConfig
from fusionreid.engine.evaluation.baselines import _lab, colour_histogram


def saved(folder: Path, name: str, upper: tuple[int, int, int], lower: tuple[int, int, int]) -> Record:
    pixels = np.zeros((128, 64, 3), np.uint8)
    pixels[:64], pixels[64:] = upper, lower
    Image.fromarray(pixels).save(folder / name)
    return Record(str(folder / name), 1, 0)


def test_rows_are_unit_vectors_of_colour_by_height(tmp_path: Path) -> None:
    red, blue = (180, 30, 40), (30, 40, 180)
    rows = colour_histogram([
        saved(tmp_path, "a.png", red, blue), saved(tmp_path, "b.png", red, blue), saved(tmp_path, "c.png", blue, red),
        saved(tmp_path, "d.png", tuple(int(0.7 * v) for v in red), tuple(int(0.7 * v) for v in blue)),
    ])  # fmt: skip
    assert rows.dtype == np.float32
    np.testing.assert_allclose((rows**2).sum(1), 1, rtol=1e-5)
    same, swapped, darker = rows[0] @ rows[1:].T
    assert same == pytest.approx(1, abs=1e-6)
    assert swapped < 0.2, "the same colours at other heights"
    assert darker > 0.8, "the same colours at another exposure"


def test_lab_of_known_colours() -> None:
    known = {
        (1, 1, 1): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (1, 0, 0): (53.24, 80.09, 67.20),
        (0, 0, 1): (32.30, 79.19, -107.86),
    }
    np.testing.assert_allclose(_lab(np.array(list(known), float)), list(known.values()), atol=0.2)


def test_better_than_chance_and_far_from_perfect(tmp_path: Path) -> None:
    made = SyntheticConfig(PERSONS=1, TEST_PERSONS=24, CAMERAS=3, IMAGES=3)
    split = read_split(DatasetsConfig(NAMES="synthetic", ROOT_DIR=str(tmp_path), SYNTHETIC=made))
    rows = colour_histogram([*split.query, *split.gallery])
    similarity = rows[: len(split.query)] @ rows[len(split.query) :].T

    def mean_average_precision(similarity: np.ndarray) -> float:
        precisions = []
        for query, line in zip(split.query, similarity):
            ranked = [split.gallery[i] for i in np.argsort(-line, kind="stable")]
            counted = [r for r in ranked if (r.person, r.camera) != (query.person, query.camera)]
            hits = np.flatnonzero([r.person == query.person for r in counted]) + 1
            precisions.append((np.arange(1, len(hits) + 1) / hits).mean())
        return float(np.mean(precisions))

    chance = mean_average_precision(np.random.default_rng(0).random(similarity.shape))
    assert 2.5 * chance < mean_average_precision(similarity) < 0.6
