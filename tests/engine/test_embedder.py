"""The embedder: the vectors of `fusionreid embed` from paths, Pillow images and arrays; errors that name the remedy."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fusionreid
from fusionreid import Embedder
from fusionreid.engine import cli
from fusionreid.engine.evaluation import embeddings
from fusionreid.errors import ReIDError
from tests import ROOT
from tests.runs import untrained

CAMERAS = ("hall", "back door")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained on two cameras, here with random weights, and seven crops beside it."""
    return untrained(tmp_path_factory.mktemp("embedder") / "run", CAMERAS)


@pytest.fixture(scope="module")
def crops(run: Path) -> list[Path]:
    return sorted((run.parent / "crops").iterdir())


@pytest.fixture(scope="module")
def embedder(run: Path) -> Embedder:
    return Embedder(run, device="cpu", batch=3)


def arrays(crops: list[Path]) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in crops]


@pytest.mark.parametrize("batch", [3, 64])
def test_the_vectors_are_those_of_embed_to_the_last_bit(
    run: Path, crops: list[Path], tmp_path: Path, batch: int
) -> None:
    argv = ["--config_file", f"{run}/config.yml", "--images", f"{run.parent}/crops", "--output", f"{tmp_path}/out"]
    assert cli.main(["embed", *argv, f"TEST.IMS_PER_BATCH={batch}", "TEST.FEAT_NORM=yes"]) == 0
    stored = embeddings.load(tmp_path / "out")
    embedder = Embedder(run, batch=batch)
    found = embedder(Path(record.path) for record in stored.records)
    assert found.dtype == np.float32
    assert found.shape == (7, embedder.dimension)
    np.testing.assert_array_equal(found, stored.features.numpy())
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_paths_pillow_images_and_arrays_are_one(embedder: Embedder, crops: list[Path]) -> None:
    expected = embedder(crops)
    with_names: dict[str, Callable[[], np.ndarray]] = {
        "texts": lambda: embedder([str(path) for path in crops]),
        "pillow": lambda: embedder(Image.open(path) for path in crops),
        "rgb": lambda: embedder(arrays(crops)),
        "bgr": lambda: embedder([pixels[..., ::-1] for pixels in arrays(crops)], channels="bgr"),
        "mixed": lambda: embedder([crops[0], Image.open(crops[1]), *arrays(crops)[2:]]),
        "fortran": lambda: embedder([np.asfortranarray(pixels) for pixels in arrays(crops)]),
    }
    for name, given in with_names.items():
        np.testing.assert_array_equal(given(), expected, err_msg=name)
    assert np.abs(embedder(arrays(crops), channels="bgr") - expected).max() > 1e-3
    frame = np.zeros((2, 40, 30, 3), np.uint8)
    np.testing.assert_array_equal(embedder(frame), embedder(list(frame)))
    np.testing.assert_array_equal(embedder(crops[:1]), embedder(crops[0]))
    np.testing.assert_array_equal(embedder(crops[:1]), embedder(arrays(crops)[0]))
    assert embedder([]).shape == (0, embedder.dimension)


def test_a_grey_array_is_a_grey_file_and_alpha_of_pillow_is_left_out(embedder: Embedder, tmp_path: Path) -> None:
    grey = np.arange(200, dtype=np.uint8).reshape(20, 10)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    clear = Image.fromarray(np.dstack([grey, grey, grey, 255 - grey]))
    expected = embedder(tmp_path / "grey.png")
    for same in (grey, grey[..., None], clear):
        np.testing.assert_array_equal(embedder(same), expected)


def test_cameras_are_known_by_their_names(embedder: Embedder, crops: list[Path]) -> None:
    assert embedder.cameras == ("hall", "back door")
    unknown, hall, door = embedder(crops), embedder(crops, "hall"), embedder(crops, "back door")
    assert min(np.abs(hall - door).max(), np.abs(hall - unknown).max()) > 1e-5
    mixed = embedder(crops, [None, "hall", "back door", "hall", None, "hall", "hall"])
    rows = zip((unknown, hall, door, hall, unknown, hall, hall), range(7))
    np.testing.assert_array_equal(mixed, np.stack([vectors[i] for vectors, i in rows]))
    for cameras, text in {
        ("hal",): "did you mean 'hall'", ("1",): "'hall', 'back door', or None", (0,): "or None for the mean",
        ("hall",) * 6: "cameras has 6 names for more images", ("hall",) * 9: "cameras has 9 names for 7 images",
    }.items():  # fmt: skip
        with pytest.raises(ReIDError, match=text):
            embedder(crops, cameras)


@pytest.mark.parametrize(("image", "text"), [
    (np.zeros((0, 10, 3), np.uint8), "images\\[0\\] is empty, its shape is \\(0, 10, 3\\): leave out boxes"),
    (np.zeros((9, 9, 3), np.float32), "must be uint8, values from 0 to 255, got float32"),
    (np.zeros((9, 9, 3), np.int64), "must be uint8"),
    (np.zeros((9, 9, 4), np.uint8), "got \\(9, 9, 4\\): keep three channels, image\\[..., :3\\]"),
    (np.zeros((3, 9, 9), np.uint8), "got \\(3, 9, 9\\): channels come last"),
    (np.zeros(9, np.uint8), "must be an array \\(H, W, 3\\)"),
    (torch.zeros(3, 9, 9), "images\\[0\\] must be an array|a path, a Pillow image"),
    (b"bytes", "got bytes"),
    (7, "got int"),
    ([None], "got NoneType"),
    ("nowhere.jpg", "there is no image nowhere.jpg: check the path; relative ones start in /"),
    (".", "is a folder: name the images in it"),
    ("text.jpg", "cannot read the image text.jpg"),
])  # fmt: skip
def test_what_cannot_be_used_is_named(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: object, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ReIDError, match=text):
        embedder(image)


def test_an_order_of_channels_that_is_none_and_a_batch_of_none_are_refused(run: Path, embedder: Embedder) -> None:
    with pytest.raises(ReIDError, match="channels must be 'rgb', or 'bgr'"):
        embedder(np.zeros((9, 9, 3), np.uint8), channels="BGR")
    with pytest.raises(ReIDError, match="batch must be 1 or more, got 0"):
        Embedder(run, batch=0)
    for device in ("cuda:99", "mps", "gpu"):
        with pytest.raises(ReIDError, match="device"):
            Embedder(run, device=device)


def test_a_run_a_checkpoint_and_a_configuration_are_the_same_model(
    run: Path, embedder: Embedder, crops: list[Path], tmp_path: Path
) -> None:
    (step,) = (run / "checkpoints").iterdir()
    for source in (run / "config.yml", run / "checkpoints", step, step / "model.safetensors", str(run)):
        other = Embedder(source, batch=3)
        assert other.model_digest == embedder.model_digest
        np.testing.assert_array_equal(other(crops), embedder(crops))
    moved = tmp_path / "moved"
    moved.symlink_to(run)
    assert Embedder(moved).cameras == embedder.cameras
    (tmp_path / "new").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"")
    for name, text in {
        "new": "new holds no checkpoint: train the run first",
        "gone": "neither the folder of a run nor a configuration",
        "weights.pth": "holds weights without a configuration",
    }.items():  # fmt: skip
        with pytest.raises(ReIDError, match=text):
            Embedder(tmp_path / name)


def test_what_the_run_trained_counts_and_not_what_its_settings_say_of_the_model(run: Path, tmp_path: Path) -> None:
    """Keys of the command line are in the checkpoint, not in config.yml; FEAT is the owner's to choose afterwards."""
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    (tmp_path / "config.yml").write_text("MODEL:\n  MIX_DIM: 48\nTEST:\n  FEAT: 3\n  FEAT_NORM: no\n")
    vectors = Embedder(tmp_path)(np.zeros((9, 9, 3), np.uint8))
    assert vectors.shape == (1, 24)
    assert np.linalg.norm(vectors) == pytest.approx(1, abs=1e-6)


def test_a_model_that_takes_all_cameras_alike_does_not_look_at_their_names(run: Path, tmp_path: Path) -> None:
    embedder = Embedder(untrained(tmp_path / "run", CAMERAS, MODEL__SIE_CAMERA="no"))
    assert embedder.cameras == ()
    assert embedder.model_digest != Embedder(run).model_digest
    image = np.zeros((9, 9, 3), np.uint8)
    np.testing.assert_array_equal(embedder(image, "garden"), embedder(image))


def test_a_vector_that_is_not_finite_names_its_image(run: Path, crops: list[Path]) -> None:
    embedder = Embedder(run)
    with torch.no_grad():
        next(iter(embedder._model.parameters())).fill_(torch.nan)
    with pytest.raises(ReIDError, match=r"features of 7 of 7 images are not finite.*0\.png"):
        embedder(crops)


def test_the_package_hands_the_embedder_out_without_torch() -> None:
    assert "Embedder" in fusionreid.__all__
    script = "import sys, fusionreid; fusionreid.__version__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
