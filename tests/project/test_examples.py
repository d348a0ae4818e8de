"""The examples run: the tracker gets a vector for every box that shows something, and keeps persons apart."""

import runpy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from fusionreid import Embedder
from tests import ROOT
from tests.runs import untrained

FRAMES = range(1, 21)


@pytest.fixture
def sequence(tmp_path: Path) -> Path:
    """Two persons who walk towards each other and past, one frame without any box, and a box outside of the frame."""
    (tmp_path / "det").mkdir()
    (tmp_path / "img1").mkdir()
    random, lines = np.random.default_rng(1), []
    persons = [np.kron(random.integers(0, 256, (4, 2, 3), np.uint8), np.ones((8, 8, 1), np.uint8)) for _ in "ab"]
    for frame in FRAMES:
        pixels = np.full((70, 120, 3), 128, np.uint8)
        for person, left, top in zip(persons, (4 * frame, 84 - 4 * frame), (0, 36)):
            if frame != 3:
                pixels[top : top + 32, left : left + 16] = person
                lines.append(f"{frame},-1,{left},{top},16,32,0.9,-1,-1,-1")
        lines.append(f"{frame},-1,200,14,16,32,0.9,-1,-1,-1")
        Image.fromarray(pixels).save(tmp_path / f"img1/{frame:06}.png")
    (tmp_path / "det/det.txt").write_text("\n".join(lines))
    return tmp_path


class Seen(NamedTuple):
    track_id: int
    box: list[float]
    time_since_update: int = 0

    def is_confirmed(self) -> bool:
        return True

    def to_ltwh(self) -> list[float]:
        return self.box


class ByAppearance:
    """A tracker that looks at nothing but vectors."""

    def __init__(self) -> None:
        self.known: list[np.ndarray] = []

    def update_tracks(self, boxes: list[Any], embeds: list[np.ndarray]) -> list[Seen]:
        assert len(boxes) == len(embeds)
        tracks = []
        for (box, _, _), vector in zip(boxes, embeds):
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
            cosines = [vector @ known for known in self.known]
            if max(cosines, default=-1.0) < 0.99999:
                self.known.append(vector)
                cosines.append(1.0)
            tracks.append(Seen(int(np.argmax(cosines)), box))
        return tracks


@pytest.mark.parametrize("tracker", ["by appearance", "deep-sort-realtime"])
def test_persons_who_pass_each_other_stay_who_they_are(sequence: Path, tmp_path: Path, tracker: str) -> None:
    if tracker == "deep-sort-realtime":
        package = pytest.importorskip(
            "deep_sort_realtime.deepsort_tracker", reason="deep-sort-realtime is not installed"
        )
        follows = package.DeepSort(embedder=None, max_cosine_distance=0.4, n_init=1)
    else:
        follows = ByAppearance()
    embedder = Embedder(untrained(tmp_path / "run", ("hall",)))
    example = runpy.run_path(str(ROOT / "examples/track.py"))
    rows = list(example["track"](embedder, follows, sequence))
    assert {row[0] for row in rows} - {1, 2} == set(FRAMES) - {1, 2, 3}  # a tracker may wait for a second look
    ways = [[row for row in rows if row[1] == name] for name in {row[1] for row in rows}]
    assert len(ways) == 2
    for way in ways:
        places = [left for _, _, left, *_ in way]
        assert places == sorted(places) or places == sorted(places, reverse=True)
