"""The doctor: one table with everything wrong in it, one exit code; and a thousand spoilt images in one run."""

import io
import json
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusionreid.dataloading import shared_memory
from fusionreid.dataloading.decode import BICUBIC, decode
from fusionreid.dataloading.records import DataError
from fusionreid.engine import preflight
from fusionreid.engine.checkpoints.checkpoint import latest
from fusionreid.engine.doctor import main
from fusionreid.engine.train import main as train
from fusionreid.sealed import entries, seal
from fusionreid.weights.checkpoint_files import FORMAT, MANIFEST, STATE
from tests.runs import ROOT, arguments

ROWS = ["versions", "device", "data set", "image files", "batches", "test", "weights", "checkpoint", "disk", "memory"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def verdicts(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line[:1].strip()]
    return {line[:15].strip(): line[15:22].strip() for line in lines}


def test_all_is_well(root, tmp_path, capfd):
    assert main([*arguments(root, tmp_path / "out"), "--decode"]) == 0
    text, errors = capfd.readouterr()
    assert verdicts(text) == dict.fromkeys(ROWS, "ok")
    assert "synthetic in" in text
    assert f"{len(list(root.rglob('*.jpg')))}: decoded" in text
    assert "4 persons x 4 images, for 1, 2, 4 processes" in text
    assert [line.partition("INFO ")[2][:23] for line in errors.splitlines()] == ["next: fusionreid train "]
    assert not (tmp_path / "out").exists()


def test_processes_that_would_mine_among_one_person_are_not_offered(root, tmp_path, capfd):
    assert main(arguments(root, tmp_path / "out", PARALLEL__EXACT="no")) == 0
    assert "4 persons x 4 images, for 1, 2 processes" in capfd.readouterr().out


def test_everything_wrong_is_told_at_once(root, tmp_path, capfd, monkeypatch):
    (tmp_path / "out").write_text("")
    monkeypatch.setattr(preflight, "NEEDED", ("torch", "nosuchpackage"))
    monkeypatch.setattr(shared_memory, "SHARED", Path("/proc"))  # no room at all
    keys = {"DATALOADER__NUM_WORKERS": 2, "MODEL__PRETRAIN_CHOICE": "imagenet", "TEST__WEIGHT": tmp_path / "none.pth"}
    assert main(arguments(root, tmp_path / "out", **keys)) == 2
    text, errors = capfd.readouterr()
    wrong = ["versions", "weights", "checkpoint", "disk", "memory"]
    assert verdicts(text) == dict.fromkeys(ROWS, "ok") | dict.fromkeys(wrong, "WRONG")
    assert "pip install nosuchpackage" in text
    assert "MODEL.PRETRAIN_PATH_R: no such file" in text
    assert "or set DATALOADER.NUM_WORKERS lower" in text
    assert f"error: a training would stop at: {', '.join(wrong)}" in errors


@pytest.mark.parametrize(("keys", "code", "words"), [
    ({"DATASETS__NAMES": "market1501", "DATASETS__ROOT_DIR": "/nowhere"}, 2, "no folder /nowhere"),
    ({"SOLVER__IMS_PER_BATCH": 64}, 2, "8 persons to train on, a batch needs 16"),
    ({"SOLVER__BASE_LRR": 1}, 2, "did you mean SOLVER.BASE_LR"),
])  # fmt: skip
def test_what_is_wrong_has_the_words_of_training(root, tmp_path, capfd, keys, code, words):
    assert main(arguments(root, tmp_path, **keys)) == code
    assert words in "".join(capfd.readouterr())


def test_a_full_disk_is_code_4(root, tmp_path, capfd, monkeypatch):
    usage = preflight.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert main(arguments(root, tmp_path)) == 4
    assert "make room or set another OUTPUT_DIR" in capfd.readouterr().out


def seeds(rng: np.random.Generator) -> list[tuple[str, bytes]]:
    coarse = Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8)).resize((24, 48))
    made = []
    for suffix, kind, mode, options in (
        (".jpg", "JPEG", "RGB", {}), (".jpg", "JPEG", "RGB", {"progressive": True}), (".jpeg", "JPEG", "L", {}),
        (".jpg", "JPEG", "CMYK", {}), (".png", "PNG", "RGB", {}), (".png", "PNG", "P", {}),
        (".webp", "WEBP", "RGB", {}), (".gif", "GIF", "P", {}), (".bmp", "BMP", "RGB", {}),
        (".tif", "TIFF", "RGB", {}), (".ppm", "PPM", "RGB", {}),
    ):  # fmt: skip
        file = io.BytesIO()
        coarse.convert(mode).save(file, kind, **options)
        made.append((suffix, file.getvalue()))
    return made


def mutated(rng: np.random.Generator, suffix: str, data: bytes, how: int) -> tuple[str, bytes]:
    """One of nine kinds of damage."""
    bytes_ = bytearray(data)
    place, length = int(rng.integers(len(data))), int(rng.integers(1, 200))
    match how:
        case 0:
            for _ in range(8):
                bytes_[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        case 1:
            bytes_ = bytes_[:place]
        case 2:
            bytes_[place : place + length] = bytes(len(bytes_[place : place + length]))
        case 3:
            suffix = str(rng.choice([".jpg", ".png", ".gif", ".tiff", ".webp", ".bmp"]))
        case 4:
            bytes_ = bytes_[: place % 3]
        case 5:
            bytes_ = bytearray(b"<html>404 not found</html>\n" * length)
        case 6:  # four bytes of the header, where sizes are, become huge ones
            at = int(rng.integers(2, min(len(data), 200) - 4))
            bytes_[at : at + 4] = struct.pack(">HH", *rng.integers(1, 65536, 2))
        case 7:
            for _ in range(4):
                bytes_[rng.integers(min(len(data), 64))] = int(rng.integers(256))
        case 8:
            bytes_ += rng.bytes(length)
    return suffix, bytes(bytes_)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_thousand_spoilt_images_decode_or_are_named(tmp_path):
    rng = np.random.default_rng(0)
    files = seeds(rng)
    paths = []
    for i in range(1000):
        suffix, data = mutated(rng, *files[i % len(files)], how=i // len(files) % 9)
        part = ("train", "query", "gallery")[i % 3]
        path = tmp_path / "data" / part / str(i % 16) / f"c{1 + i % 5}_{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        paths.append(str(path))
    argv = arguments(tmp_path / "data", tmp_path / "out", DATASETS__NAMES="folder", DATASETS__ON_BAD="skip")
    start = time.monotonic()
    run = subprocess.run([sys.executable, str(ROOT / "engine/doctor.py"), *argv, "--decode"], capture_output=True,
                         text=True, timeout=60, check=False)  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert time.monotonic() - start < 30
    named = {line["path"]: line["reason"] for line in json.loads((tmp_path / "out/bad_images.json").read_text())}
    assert f"{len(named)} of 1,000 image files cannot be used:" in run.stdout
    refused = set()
    for path in paths:
        try:
            decode(path, (32, 16), BICUBIC)
        except DataError:
            refused.add(path)
    assert named.keys() == refused
    assert 300 < len(refused) < 900
    assert all(named.values())


def test_a_checkpoint_that_training_would_refuse_is_wrong_here_too(root, tmp_path, capfd):
    """Both end with 3, and with the same table of what does not fit."""
    assert train(arguments(root, tmp_path, SOLVER__MAX_EPOCHS=1, SOLVER__EVAL_PERIOD=1)) == 0
    assert main(arguments(root, tmp_path, SOLVER__MAX_EPOCHS=1, SOLVER__EVAL_PERIOD=1, TEST__WEIGHT=tmp_path)) == 0
    text = capfd.readouterr().out
    assert f"training resumes from {tmp_path}/checkpoints/step-" in text
    assert "is whole and fits the model" in text
    best = tmp_path / "checkpoints/best.json"
    kept = best.read_text()
    best.write_text(kept.replace("1", "2", 1))
    assert main(arguments(root, tmp_path, SOLVER__MAX_EPOCHS=1, SOLVER__EVAL_PERIOD=1)) == 3
    assert "best.json is damaged" in capfd.readouterr().out
    best.write_text(kept)
    for key, value in {"SOLVER__BASE_LR": 0.5, "MODEL__MIX_DIM": 48, "SOLVER__MAX_EPOCHS": 2}.items():
        argv = arguments(root, tmp_path, **{"SOLVER__MAX_EPOCHS": 1, "SOLVER__EVAL_PERIOD": 1, key: value})
        assert (main(argv), train(argv)) == (3, 3)
        told, refused = capfd.readouterr()
        assert verdicts(told)["checkpoint"] == "WRONG"
        row = next(line for line in refused.splitlines() if line.startswith(f"  {key.replace('__', '.')}"))
        assert row.strip() in told
        assert re.search(r"checkpoints/step-\d+: the configuration of the checkpoint does not fit", told)
    for text in (told, refused):  # of the run that was to be longer
        assert "More epochs: the learning rate of every step depends on SOLVER.MAX_EPOCHS" in text
        assert f"MODEL.PRETRAIN_CHOICE checkpoint MODEL.PRETRAIN_PATH {tmp_path}/checkpoints/step-" in text
    newest = latest(tmp_path / "checkpoints")
    (newest / MANIFEST).write_bytes(seal({"format": FORMAT, "files": entries([newest / STATE])}))
    assert main(arguments(root, tmp_path, SOLVER__MAX_EPOCHS=1, SOLVER__EVAL_PERIOD=1)) == 3
    assert f"{newest}: the model of the checkpoint does not fit" in capfd.readouterr().out


def test_a_test_set_of_one_person_is_a_warning_and_not_ok(tmp_path, capfd):
    one = {"DATASETS__SYNTHETIC__TEST_PERSONS": 1}
    assert main(arguments(tmp_path / "data", tmp_path / "out", **one)) == 0
    text, errors = capfd.readouterr()
    assert verdicts(text)["test"] == "warning"
    assert text.count("all queries show one person: the results are of that person") == 1
    assert "WARNING synthetic: all queries show one person" in errors  # as train and evaluate say it too
