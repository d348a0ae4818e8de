"""Track persons through a video by place and appearance: deep-sort-realtime with the vectors of a trained model.

    pip install deep-sort-realtime
    python examples/track.py log/shop sequence > tracks.csv

`sequence` is laid out as by MOT Challenge: frames are img1/000001.jpg and so on, and det/det.txt has the boxes of a
person detector, a line each: frame, -1, left, top, width, height, confidence. Lines that come out: frame, track, left,
top, width, height.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusionreid import Embedder


def track(embedder: Embedder, tracker: Any, sequence: Path) -> Iterator[tuple[Any, ...]]:
    """Yield (frame, track, left, top, width, height) of every person who is tracked and seen."""
    boxes = defaultdict(list)
    with open(sequence / "det/det.txt", newline="") as file:
        for frame, _, left, top, width, height, confidence, *_ in csv.reader(file):
            boxes[int(frame)].append(([*map(float, (left, top, width, height))], float(confidence), "person"))
    for path in sorted((sequence / "img1").iterdir()):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        seen = [(box, crop) for box in boxes[int(path.stem)] if (crop := cut(pixels, *box[0])).size]
        vectors = embedder([crop for _, crop in seen])  # of OpenCV's frames: embedder(crops, channels="bgr")
        for person in tracker.update_tracks([box for box, _ in seen], embeds=list(vectors)):
            if person.is_confirmed() and not person.time_since_update:
                yield int(path.stem), person.track_id, *(round(value, 1) for value in person.to_ltwh())


def cut(pixels: np.ndarray, left: float, top: float, width: float, height: float) -> np.ndarray:
    """Cut a box out of a frame; what lies outside is left off."""
    first, last = (max(round(top), 0), max(round(left), 0)), (max(round(top + height), 0), max(round(left + width), 0))
    return pixels[first[0] : last[0], first[1] : last[1]]


if __name__ == "__main__":
    from deep_sort_realtime.deepsort_tracker import DeepSort  # any tracker that takes vectors will do

    persons = track(Embedder(sys.argv[1]), DeepSort(embedder=None, max_cosine_distance=0.4), Path(sys.argv[2]))
    csv.writer(sys.stdout).writerows(persons)
