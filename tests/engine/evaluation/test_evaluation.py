"""Evaluation, embedding and search by their commands: files, ranking again, two processes, other data, bad input."""

import base64
import json
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fusionreid.dataloading import read_split
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import load_config
from fusionreid.engine.embed import main as embed
from fusionreid.engine.evaluate import main as evaluate
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.search import main as search
from fusionreid.engine.storage import lock
from tests import ROOT
from tests.runs import arguments, command, finish

ASKED = {"TEST__RE_RANKING": "yes", "TEST__QUERY_EXPANSION": 3, "TEST__DETAILS": "yes"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def weights(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an untrained model."""
    _, path, *overrides = arguments(data, data)
    cfg = load_config(path, overrides)
    split = read_split(cfg.DATASETS)
    torch.manual_seed(3)
    model = build(cfg, split.num_persons, split.num_cameras)
    state = {"classes": split.num_persons, "cameras": split.cameras, "config": cfg.model_dump(mode="json")}
    return checkpoint.save(tmp_path_factory.mktemp("weights"), 1, {"model": model.state_dict()}, state)


@pytest.fixture(scope="module")
def evaluated(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluated")
    assert evaluate(arguments(data, output, TEST__WEIGHT=weights, **ASKED)) == 0
    return output


def results(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def test_two_processes_find_what_one_finds(data: Path, weights: Path, evaluated: Path, tmp_path: Path) -> None:
    run = command(*arguments(data, tmp_path, TEST__WEIGHT=weights, **ASKED), processes=2, script="evaluate")
    code, text = finish(run)
    assert code == 0, text
    one, two = (embeddings.load(folder / "embeddings") for folder in (evaluated, tmp_path))
    torch.testing.assert_close(one.features, two.features, rtol=0, atol=1e-6)  # products of other batch sizes
    assert one.records == two.records
    assert_equal_maps(evaluated, tmp_path)
    assert results(tmp_path)["results"].keys() == {"FusionReID", "expanded queries", "re-ranked"}
    for name, expected in results(evaluated)["results"].items():
        assert results(tmp_path)["results"][name]["mAP"] == pytest.approx(expected["mAP"], abs=1e-3)
    for name in ("camera_pairs", "thresholds", "pairs", "single_gallery_shot", "multi_query"):
        assert_nearly_equal(results(tmp_path)[name], results(evaluated)[name])


def assert_equal_maps(one: Path, two: Path) -> None:
    """Of the same queries, up to a JPEG's rounding."""
    shown = [json.loads((folder / "queries.json").read_text())["queries"] for folder in (one, two)]
    assert len(shown[0]) == 6
    for ours, theirs in zip(*shown, strict=True):
        assert ours["person"] == theirs["person"]
        assert ours["maps"].keys() == theirs["maps"].keys()
        assert len(ours["maps"]) == 3
        for pictures in zip(ours["maps"].values(), theirs["maps"].values()):
            a, b = (np.asarray(Image.open(BytesIO(base64.b64decode(picture)))) for picture in pictures)
            np.testing.assert_allclose(a.astype(int), b.astype(int), atol=6)


def assert_nearly_equal(ours: Any, theirs: Any) -> None:
    """Numbers in nested lists and dictionaries."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list):
        for a, b in zip(ours, theirs, strict=True):
            assert_nearly_equal(a, b)
    else:
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_results_are_written_before_the_details_which_may_fail(
    data: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fusionreid.engine.reporting.evaluate_run.details", fail)
    argv = arguments(data, tmp_path, TEST__EMBEDDINGS=evaluated / "embeddings", **ASKED)
    assert evaluate(argv) == 6
    assert results(tmp_path)["results"] == results(evaluated)["results"]
    assert "thresholds" not in results(tmp_path)


def test_a_compiled_evaluation_finds_the_same_and_still_draws_its_maps(
    data: Path, weights: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_module(module: nn.Module, **options: Any) -> None:
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    torch._dynamo.reset()
    assert evaluate(arguments(data, tmp_path, TEST__WEIGHT=weights, PARALLEL__COMPILE="blocks")) == 0
    assert compiled
    one, two = (embeddings.load(folder / "embeddings") for folder in (evaluated, tmp_path))
    torch.testing.assert_close(one.features, two.features, rtol=0, atol=1e-6)
    assert_equal_maps(evaluated, tmp_path)


def test_only_the_first_process_opens_images_to_look_at_them(data: Path, weights: Path, tmp_path: Path) -> None:
    """Each of sixty-four would else read header and end of all."""
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.new("RGB", (16, 32), (40 * i,) * 3).save(tmp_path / "images" / f"{i}.png")
    script = tmp_path / "looking.py"
    script.write_text(f"""
import os, sys
sys.path[0] = {str(ROOT)!r}
from fusionreid.dataloading import bad_images
from fusionreid.engine.embed import main
look = bad_images.inspect_file
def looked(path):
    open({str(tmp_path)!r} + "/looked-" + os.environ["RANK"], "a").write(path)
    return look(path)
bad_images.inspect_file = looked
sys.exit(main())
""")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    argv = ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "stored")]
    subprocess.run([sys.executable, *launcher, *argv, *arguments(data, tmp_path, TEST__WEIGHT=weights)], check=True)
    assert sorted(path.name for path in tmp_path.glob("looked-*")) == ["looked-0"]
    names = ["features-00000-of-00002.npy", "features-00001-of-00002.npy", "index.json"]
    assert sorted(path.name for path in (tmp_path / "stored").iterdir()) == names
    assert len(embeddings.load(tmp_path / "stored").features) == 5


def test_stored_embeddings_are_ranked_again_to_the_same_numbers(data: Path, evaluated: Path, tmp_path: Path) -> None:
    stored = {"TEST__EMBEDDINGS": evaluated / "embeddings", "DATASETS__ROOT_DIR": tmp_path / "nowhere"}
    assert evaluate(arguments(data, tmp_path, **stored, **ASKED)) == 0
    again, first = results(tmp_path), results(evaluated)
    assert again["results"] == first["results"]
    assert again["camera_pairs"] == first["camera_pairs"]
    assert again["thresholds"] == first["thresholds"]
    assert [point["false_positive_rate"] for point in first["thresholds"]] == [1e-2]  # of a few hundred pairs
    assert again["checkpoint"] == first["checkpoint"]
    run = command(*arguments(data, tmp_path / "two", **stored, **ASKED), processes=2, script="evaluate")
    code, text = finish(run)
    assert code == 0, text
    assert results(tmp_path / "two")["results"] == first["results"]


def test_mirrored_images_have_the_same_features_with_flip(data: Path, weights: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 16, 3), np.uint8)
    (tmp_path / "images").mkdir()
    for name, array in {"a": pixels, "b": pixels[:, ::-1]}.items():
        Image.fromarray(array).save(tmp_path / "images" / f"{name}.png")
    wanted = ["--images", str(tmp_path / "images"), "--output"]
    for flip in ("yes", "no"):
        argv = arguments(data, tmp_path, TEST__WEIGHT=weights, TEST__FLIP=flip)
        assert embed([*wanted, str(tmp_path / flip), *argv]) == 0
    gaps = {flip: embeddings.load(tmp_path / flip).features.diff(dim=0).abs().max() for flip in ("yes", "no")}
    assert gaps["yes"] < 1e-6 < 1e-3 < gaps["no"]


def test_search_finds_each_image_itself_first(data: Path, weights: Path, evaluated: Path, tmp_path: Path) -> None:
    stored, found = str(evaluated / "embeddings"), tmp_path / "found.json"
    assert search(["--query", stored, "--gallery", stored, "--top", "3", "--json", str(found)]) == 0
    lines = json.loads(found.read_text())
    assert all(line["matches"][0]["path"] == line["query"] and len(line["matches"]) == 3 for line in lines)
    assert {line["camera"] for line in lines} == {"1", "2"}
    assert all(f"/{line['person']}_c{line['camera']}" in line["query"] for line in lines)  # as in the files' names
    cosines = sorted(match["cosine"] for line in lines for match in line["matches"])
    least = cosines[len(cosines) // 2]
    assert search(["--query", stored, "--gallery", stored, "--top=3", f"--at-least={least}", f"--json={found}"]) == 0
    some = [match["cosine"] for line in json.loads(found.read_text()) for match in line["matches"]]
    assert sorted(some) == [cosine for cosine in cosines if cosine >= least]
    image = embeddings.load(evaluated / "embeddings").records[5].path
    argv = arguments(data, tmp_path, TEST__WEIGHT=weights)
    assert search(["--query", image, "--gallery", stored, "--json", str(found), *argv]) == 0
    (line,) = json.loads(found.read_text())
    assert len(line["matches"]) == 10


def test_a_checkpoint_of_another_data_set_has_no_cameras(
    data: Path, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = {"TEST__WEIGHT": weights, "DATASETS__NAMES": "market", "DATASETS__ROOT_DIR": data / "synthetic"}
    assert evaluate(arguments(data, tmp_path, **other)) == 2
    assert "was trained on synthetic" in capfd.readouterr().err
    assert evaluate(arguments(data, tmp_path, **other, TEST__SIE_UNKNOWN="mean")) == 0


def test_a_checkpoint_with_keys_of_another_version_is_named(
    data: Path, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors, state = checkpoint.load(weights)
    state["config"]["SOLVER"]["LATER"] = 1
    path = checkpoint.save(tmp_path, 1, tensors, state)
    assert evaluate(arguments(data, tmp_path, TEST__WEIGHT=path)) == 3
    assert re.search(r"step-00000001 is of another version.*use that version\n.*SOLVER.LATER", capfd.readouterr().err)


def test_bad_embeddings_are_named(
    data: Path, evaluated: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = embeddings.load(evaluated / "embeddings")

    def stored(name: str, features: torch.Tensor, num_query: int = whole.num_query) -> Path:
        embeddings.save(tmp_path / name, features, whole.records, num_query, {})
        return tmp_path / name

    broken = whole.features.clone()
    broken[3, 0] = torch.nan
    narrow = stored("narrow", whole.features[:, :7])
    for folder, code, words in (
        (stored("broken", broken), 5, Path(whole.records[3].path).name),
        (stored("no query", whole.features, 0), 2, "query has no image"),
        (stored("no gallery", whole.features, len(whole.records)), 2, "gallery has no image"),
        (tmp_path, 3, "holds no whole embeddings"),
    ):
        assert evaluate(arguments(data, tmp_path / "out", TEST__EMBEDDINGS=folder)) == code
        assert words in capfd.readouterr().err
    assert search(["--query", str(narrow), "--gallery", str(evaluated / "embeddings")]) == 3
    assert "features 7 wide, the gallery" in capfd.readouterr().err
    assert embed(["--images", str(narrow), "--output", str(tmp_path / "x"), *arguments(data, tmp_path)]) == 2
    assert "holds no images" in capfd.readouterr().err


@pytest.mark.parametrize("what", ["folder", "file"])
def test_nothing_but_embeddings_is_replaced(
    data: Path, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    """Least of all the images themselves."""
    images, precious = tmp_path / "images", tmp_path / ("images" if what == "folder" else "note.txt")
    images.mkdir()
    Image.new("RGB", (16, 32)).save(images / "a.png")
    (tmp_path / "note.txt").write_text("kept")
    argv = arguments(data, tmp_path, TEST__WEIGHT=weights)
    assert embed(["--images", str(images), "--output", str(precious), *argv]) == 2
    assert "name a folder that is not there yet" in capfd.readouterr().err
    assert [path.name for path in images.iterdir()] == ["a.png"]
    assert (tmp_path / "note.txt").read_text() == "kept"
    for _ in range(2):  # its own may be replaced
        assert embed(["--images", str(images), "--output", str(tmp_path / "own"), *argv]) == 0


def test_one_command_at_a_time_writes_into_an_output_folder(
    data: Path, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two evaluations would write the rows of one file, and a training's exit.json is its own."""
    with lock(tmp_path):
        assert evaluate(arguments(data, tmp_path, TEST__WEIGHT=weights)) == 2
        assert "is in use by process" in capfd.readouterr().err
        assert not (tmp_path / "exit.json").exists()
    assert evaluate(arguments(data, tmp_path, TEST__WEIGHT=weights)) == 0
