"""The examples run: each is short, and does with a small model what it says."""

import itertools
import json
import runpy
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from fusionreid import Embedder
from fusionreid.dataloading.datasets.synthetic import render_person
from fusionreid.engine.config import load_config
from fusionreid.engine.exporter import export_model
from tests import ROOT
from tests.runs import KEYS, untrained

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


SMALL = [word for pair in KEYS.items() for word in pair if not pair[0].startswith("DATASETS.SYNTHETIC")]
SMALL += ["MODEL.PRETRAIN_CHOICE", "none"]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight persons in two cameras, a folder each."""
    folder = tmp_path_factory.mktemp("crops")
    for person, camera, image in itertools.product(range(8), range(2), range(2)):
        (folder / f"person{person}").mkdir(exist_ok=True)
        pixels = render_person(0, person, camera, image, (32, 16))
        Image.fromarray(pixels).save(folder / f"person{person}/c{camera + 1}_{image}.jpg")
    return folder


def test_a_model_is_trained_on_a_folder(rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(ROOT / "examples/train_on_folder.py"))
    results = example["train"](str(rendered), "shop", SMALL)
    assert 0 < results["mAP"] <= 1
    assert results["valid_queries"] > 0
    with pytest.raises(SystemExit, match="2"):
        example["train"](str(tmp_path / "nowhere"), "other")


def test_a_person_is_found_above_the_measured_threshold_only(rendered: Path, tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples/find_person.py"))
    points = [{"cosine": 0.9, "false_positive_rate": 1e-4}, {"cosine": 0.8, "false_positive_rate": 1e-3}]
    for known in (points, points[::-1], []):
        (tmp_path / "metrics.json").write_text(json.dumps({"thresholds": known}))
        with nullcontext() if known else pytest.raises(SystemExit, match="too few pairs"):
            assert example["threshold"](tmp_path) == 0.8
    embedder, images = Embedder(untrained(tmp_path / "run", ("hall",))), sorted(rendered.rglob("*.jpg"))
    find = example["find"]
    everything = list(find(embedder, images[3], images, -1.0))
    assert everything[0] == (pytest.approx(1, abs=1e-5), images[3])
    assert {path for _, path in everything} == set(images)
    limit = everything[4][0]
    assert list(find(embedder, images[3], images, limit)) == [match for match in everything if match[0] >= limit]


@pytest.mark.slow
def test_onnx_runtime_computes_the_vectors_of_the_model(rendered: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    run, images = untrained(tmp_path / "run", ("hall", "door")), sorted(rendered.rglob("*.jpg"))[:7]
    export_model(load_config(run / "config.yml"), tmp_path / "shop.onnx")
    example = runpy.run_path(str(ROOT / "examples/run_onnx.py"))
    vectors = example["OnnxEmbedder"](tmp_path / "shop.onnx")(images)
    np.testing.assert_allclose(vectors, Embedder(run)(images), atol=1e-3)


def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = json.loads((ROOT / "examples/demo.ipynb").read_text(encoding="utf-8"))["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in codes)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for done, cell in enumerate(codes):
        exec(compile("".join(cell["source"]), "demo.ipynb", "exec"), names)
        if not done:  # the first cell has the settings
            names["settings"] += [f"{key}={value}" for key, value in KEYS.items()]
    assert names["vectors"].shape == (4, names["embedder"].dimension)
    assert Image.open("demo/found.png").size[0] > 100
    assert "mAP" in capsys.readouterr().out
