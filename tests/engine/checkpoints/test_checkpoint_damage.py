"""Checkpoints that were cut, flipped, forged or made by another version: nothing of them is believed."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.compare import compare
from fusionreid.engine.checkpoints.retention import Progress
from fusionreid.sealed import entries, entry, seal
from fusionreid.weights.checkpoint_files import FORMAT, MANIFEST, STATE, CheckpointError, DamagedError
from tests.numerics import FIXTURES

FILES = (MANIFEST, "model.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tensors = {"model": {"w": torch.arange(6.0).view(2, 3)}, "optimizer": {"w/momentum_buffer": torch.ones(2, 3)}}
    for step in (1, 2):
        checkpoint.save(tmp_path / "root", step, tensors, {"epoch": step})
    return tmp_path / "root"


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_and_the_one_before_taken(root: Path, name: str, caplog) -> None:
    path = root / "step-00000002"
    whole = (path / name).read_bytes()
    for cut in [None, *(len(whole) * i // 20 for i in range(20))]:
        (path / name).unlink() if cut is None else (path / name).write_bytes(whole[:cut])
        with pytest.raises(DamagedError, match=name) as caught:
            checkpoint.load(path)  # asked for by name: no other is taken
        assert caught.value.exit_code == 3
        caplog.clear()
        assert checkpoint.latest(root) == root / "step-00000001"
        assert [name in record.getMessage() for record in caplog.records] == [True]
        (path / name).write_bytes(whole)
    checkpoint.load(path)


def test_a_thousand_flipped_bits_are_all_found(root: Path) -> None:
    path, draw = root / "step-00000002", random.Random(1111)
    whole = {name: (path / name).read_bytes() for name in FILES}
    places = [(name, i) for name, data in whole.items() for i in range(len(data))]
    for name, i in draw.choices(places, k=1000):
        data = bytearray(whole[name])
        data[i] ^= 1 << draw.randrange(8)
        (path / name).write_bytes(data)
        with pytest.raises(DamagedError, match=name):
            checkpoint.verify(path)
        (path / name).write_bytes(whole[name])
    checkpoint.verify(path)


def test_nothing_whole_is_not_a_fresh_start(root: Path) -> None:
    for path in checkpoint.checkpoints(root):
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged: remove the folder"):
        checkpoint.latest(root)
    with pytest.raises(CheckpointError, match=r"no checkpoint folder .*step-00000009"):
        checkpoint.load(root / "step-00000009")


def test_another_format_version(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionreid.weights.checkpoint_files.FORMAT", FORMAT + 1)
    with pytest.raises(CheckpointError, match="has checkpoint format 1, this is 2"):
        checkpoint.load(root / "step-00000002")
    with pytest.raises(CheckpointError, match="format 1, this is 2"):  # and is not passed over in silence
        checkpoint.latest(root)


def test_format_1_as_released_is_read() -> None:
    tensors, state = checkpoint.load(FIXTURES / "checkpoints" / "format-1")
    assert tensors["model"]["weight"].tolist() == [[0.5, -1.25], [3.0, 0.0]]
    assert tensors["optimizer"]["weight/momentum_buffer"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert (state["step"], state["epoch"], state["seed"]) == (3, 1, 1111)


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def forge(path: Path) -> None:
    """Write a manifest that fits, as a forger can too."""
    files = entries(file for file in path.iterdir() if file.name != MANIFEST)
    (path / MANIFEST).write_bytes(seal({"format": FORMAT, "files": files}))


FORGED = {
    "pickle": lambda canary: pickle.dumps(Bomb(canary)),
    "header of 2^62 bytes": lambda _: (2**62).to_bytes(8, "little") + b"{}",
    "tensor beyond the end": lambda _: b"\x40" + bytes(7) + json.dumps(
        {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode().ljust(64),
    "deep json": lambda _: (50_000).to_bytes(8, "little") + b"[" * 50_000,
    "nothing": lambda _: b"",
}  # fmt: skip


@pytest.mark.parametrize("kind", FORGED)
def test_forged_tensors_run_nothing(root: Path, tmp_path: Path, kind: str) -> None:
    path = root / "step-00000002"
    (path / "model.safetensors").write_bytes(FORGED[kind](tmp_path / "canary"))
    forge(path)
    with pytest.raises(CheckpointError, match="not a checkpoint although its digests match"):
        checkpoint.load(path)
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()  # it would have


def manifest_of(files: object) -> bytes:
    return seal({"format": FORMAT, "files": files})


def test_forged_json_and_names(root: Path) -> None:
    path = root / "step-00000002"
    (path / "state.json").write_text("[" * 200_000)
    forge(path)
    with pytest.raises(CheckpointError, match="not a checkpoint although"):
        checkpoint.load(path)
    shutil.copy(path / "model.safetensors", root / "outside.safetensors")
    outside = {"../outside.safetensors": entry(root / "outside.safetensors")}
    for manifest in (manifest_of(outside), b"[" * 200_000, b"[]", manifest_of(["a"])):
        (path / MANIFEST).write_bytes(manifest)
        with pytest.raises(DamagedError):
            checkpoint.verify(path)
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)  # reading it would wait for ever
    with pytest.raises(DamagedError, match="not a file"):
        checkpoint.verify(path)
    (path / MANIFEST).unlink()
    os.mkfifo(path / "pipe")
    (path / MANIFEST).write_bytes(manifest_of({STATE: {}, "pipe": {"bytes": 0}}))
    with pytest.raises(DamagedError, match="not a file"):
        checkpoint.verify(path)


def test_what_does_not_fit_is_tabled() -> None:
    ours = {"classifier.weight": torch.zeros(751, 8), "bn.bias": torch.zeros(8), "new": torch.zeros(1), "classes": 751}
    theirs = {"classifier.weight": torch.zeros(1041, 8), "bn.bias": torch.zeros(8).half(), "classes": 1041, "old": 1}
    with pytest.raises(CheckpointError) as caught:
        compare("the model", ours, theirs)
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in str(caught.value).splitlines()]
    assert ["classifier.weight", "float32 [751, 8]", "float32 [1041, 8]"] in rows
    assert ["bn.bias", "float32 [8]", "float16 [8]"] in rows
    assert ["new", "float32 [1]", "absent"] in rows
    assert ["old", "absent", "1"] in rows
    with pytest.raises(CheckpointError, match=r"and 10 more\n"):
        compare("the model", dict.fromkeys(map(str, range(30)), 1), {})
    compare("the model", ours, dict(reversed(ours.items())))


def test_every_flipped_bit_of_the_record_of_evaluations_is_found(tmp_path: Path) -> None:
    checkpoint.write_progress(tmp_path, Progress(evaluated=30, best=20, score=0.75))
    assert checkpoint.read_progress(tmp_path) == Progress(30, 20, 0.75)
    mark = tmp_path / checkpoint.BEST
    whole = mark.read_bytes()
    for i in range(8 * len(whole)):
        data = bytearray(whole)
        data[i // 8] ^= 1 << i % 8
        mark.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"best\.json is damaged .*: remove it"):
            checkpoint.read_progress(tmp_path)
    for cut in range(len(whole)):
        mark.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.best(tmp_path)
