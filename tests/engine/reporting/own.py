"""Own data with names as people give them, and a run on them."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fusionreid.dataloading.datasets.synthetic import render_person

PERSONS = "Anna Müller", "client 7", "0031", "Bob <b>", "no 5", "Zoë", "guest & co", "staff-1"
CAMERAS = "front door", "hall"


class Run(NamedTuple):
    """A run on own data, and what its report showed after training."""

    output: Path
    argv: list[str]
    trained: str


def render(root: Path) -> None:
    """Half of the persons to train on, the others as query and gallery, each by both cameras."""
    for number, person in enumerate(PERSONS):
        for c, camera in enumerate(CAMERAS):
            for i in range(4):
                part = "train" if number < 4 else "query" if i == 0 else "gallery"
                folder = root / part / person / camera
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(render_person(1, number + 1, c, i, (32, 16))).save(folder / f"{i}.png")
