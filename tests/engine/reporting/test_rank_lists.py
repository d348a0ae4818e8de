"""Rank lists show the right images in the right frames."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from fusionreid.dataloading import Record, Split
from fusionreid.engine.reporting.rank_lists import FRAME, GAP, MARGIN, RIGHT, WRONG, choose_queries, rank_lists

NAN = float("nan")


@pytest.fixture
def split(tmp_path: Path) -> Split:
    def records(part: str, *who: tuple[int, int]) -> tuple[Record, ...]:
        paths = [str(tmp_path / f"{part}{i}.png") for i in range(len(who))]
        for i, path in enumerate(paths):
            Image.new("RGB", (64, 128), (40 * i, 90, 120)).save(path)
        return tuple(Record(path, *pair) for path, pair in zip(paths, who))

    gallery = records("gallery", (1, 0), (1, 1), (2, 1), (0, 2))
    return Split(
        "<set & co>", str(tmp_path), records("train", (9, 0), (9, 1)), records("query", (1, 0), (2, 0)), gallery
    )


def test_queries_spread_from_best_to_worst() -> None:
    precision = np.array([0.2, NAN, 0.9, 0.5, 0.5, 0.1])
    assert choose_queries(precision, 3).tolist() == [2, 4, 5]
    assert choose_queries(precision, 10).tolist() == [2, 3, 4, 0, 5]
    assert choose_queries(np.array([NAN]), 3).tolist() == []


def test_frames_tell_right_and_wrong_and_a_short_ranking_ends(split: Split) -> None:
    neighbours = np.array([[1, 2, -1], [3, 2, 0]])
    sheet = rank_lists(
        split.query, split.gallery, neighbours, np.full((2, 3), 0.5), np.array([0.9, 0.3]), rows=2, top=3
    )
    assert sheet.size == (2 * MARGIN + 4 * 94 + GAP, 2 * MARGIN + 2 * 208 + GAP)
    for row, frames in enumerate([(RIGHT, WRONG, "white"), (WRONG, RIGHT, WRONG)]):
        for column, frame in enumerate(frames):
            corner = MARGIN + GAP + (column + 1) * 94 + 40, MARGIN + GAP + row * 208 - FRAME + 1
            assert sheet.getpixel(corner) == ImageColor.getrgb(frame), (row, column)
    inside = sheet.getpixel((MARGIN + GAP + 94 + 40, MARGIN + GAP + 80))
    assert inside == (40, 90, 120), "the first neighbour of the best query is gallery image 1"
