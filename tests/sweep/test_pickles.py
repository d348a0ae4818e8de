"""Pickled code is never run: through no key that names a file, and no option, of any command, in any container."""

import io
import pickle
import zipfile
from collections.abc import Callable, Iterator
from os.path import expanduser
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import AfterValidator

from fusionreid.config import ModelConfig
from fusionreid.engine import arguments, cli
from fusionreid.engine.config import KEYS
from fusionreid.sealed import entries, seal
from fusionreid.weights.checkpoint_files import FORMAT, MANIFEST, STATE
from tests.model.test_formats import Canary
from tests.promises import Tally
from tests.sweep import world

CHOICES = get_args(ModelConfig.model_fields["PRETRAIN_CHOICE"].annotation)
PATH_KEYS = [
    key for key, field in KEYS.items()
    if any(isinstance(rule, AfterValidator) and rule.func is expanduser for rule in field.metadata)
]  # fmt: skip


def _zip(bomb: Canary) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": {"conv1.weight": torch.zeros(2), "extra": bomb}}, file)
    return file.getvalue()


def _legacy(bomb: Canary) -> bytes:
    file = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(2), "extra": bomb}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def _torchscript(bomb: Canary) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {
            "data.pkl": pickle.dumps(bomb),
            "constants.pkl": pickle.dumps(bomb),
            "version": b"3",
        }.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def _array(bomb: Canary) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([bomb], dtype=object), allow_pickle=True)
    return file.getvalue()


def _arrays(bomb: Canary) -> bytes:
    file = io.BytesIO()
    np.savez(file, weight=np.array([bomb], dtype=object))
    return file.getvalue()


def _tag(bomb: Canary) -> bytes:
    return f"!!python/object/apply:builtins.open [{bomb.path}, w]".encode()


FILES: dict[str, Callable[[Canary], bytes]] = {
    "weights.pth": _zip, "legacy.pth": _legacy, "plain.pkl": pickle.dumps, "model.safetensors": pickle.dumps,
    "scripted.pt": _torchscript, "array.npy": _array, "arrays.npz": _arrays, "config.yml": _tag,
}  # fmt: skip


def folder(path: Path, bomb: Canary) -> None:
    """A run, a checkpoint of torch.distributed and embeddings at once, every file of which is a pickle."""
    for step in (path, path / "checkpoints/step-00000009"):
        step.mkdir(parents=True)
        for name in ("model.safetensors", STATE, ".metadata", "__0_0.distcp"):
            (step / name).write_bytes(pickle.dumps(bomb))
        (step / MANIFEST).write_bytes(seal({"format": FORMAT, "files": entries(step.glob("[!.]*"))}))
    (path / "embeddings").mkdir()
    for name in ("embeddings/features.npy", "features-00000-of-00001.npy", "embeddings/features-00000-of-00001.npy"):
        (path / name).write_bytes(_array(bomb))
    for name in ("index.json", "embeddings/index.json", "metrics.json", "metrics.jsonl", "checkpoints/best.json"):
        (path / name).write_bytes(pickle.dumps(bomb))


def command_lines(bait: Path, output: Path) -> Iterator[list[str]]:
    """Command lines that name a file or folder: in each key, option and argument that takes a path, of each command."""
    _, commands = cli.build()
    for name, (about, parser) in commands.items():
        actions = next((action.choices for action in parser._actions if action.dest == "action"), None)  # of a gallery
        starts = [[name, action, str(bait)] for action in actions] if actions else [[name]]
        paths = [action for action in parser._actions if action.type in (arguments.path, arguments.place)]
        options = {action.option_strings[-1]: action.required for action in paths if action.option_strings}
        written = ["--output", str(output / "model.pt2")] if options.pop("--output", None) is not None else []
        read = [word for option, is_required in options.items() if is_required for word in (option, str(bait))]
        given = [*read, *written]
        for start in starts:
            yield [*start, *given, *small(output)]
            yield [*start, *given, "--config_file", str(bait)]
            for option in (option for option in options if option not in read):
                yield [*start, *(read if option == "--to" else given), option, str(bait), *small(output)]
        if not about.takes_data or name == "train":
            for key in PATH_KEYS:
                for choice in CHOICES if key.startswith("MODEL.") else CHOICES[-1:]:
                    yield [*starts[0], *given, *small(output, MODEL__PRETRAIN_CHOICE=choice), f"{key}={bait}"]


def small(output: Path, **keys: object) -> list[str]:
    return world.small(str(output), **keys)


def test_keys_that_name_files_are_found_by_their_type() -> None:
    assert {"MODEL.PRETRAIN_PATH", "MODEL.PRETRAIN_PATH_R", "TEST.WEIGHT", "TEST.EMBEDDINGS"} <= set(PATH_KEYS)


@pytest.mark.parametrize("name", FILES)
def test_the_bait_would_run(tmp_path: Path, name: str) -> None:
    data = FILES[name](Canary(tmp_path / "ran"))
    (tmp_path / name).write_bytes(data)
    match Path(name).suffix:
        case ".npy":
            np.load(tmp_path / name, allow_pickle=True)
        case ".npz":
            assert len(np.load(tmp_path / name, allow_pickle=True)["weight"])
        case ".pth":
            torch.load(tmp_path / name, weights_only=False)
        case ".yml":
            import yaml

            yaml.unsafe_load(data)
        case ".pt":
            pickle.loads(zipfile.ZipFile(tmp_path / name).read("archive/data.pkl"))
        case _:
            pickle.loads(data)
    assert (tmp_path / "ran").exists()


@pytest.mark.sweep
@pytest.mark.promise("Pickled code in any container, under any key or option of any command, never runs")
@pytest.mark.parametrize("name", [*FILES, "folder"])
def test_no_command_runs_pickled_code(tmp_path: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    canary, bait = tmp_path / "ran", tmp_path / "bait" / name
    bait.parent.mkdir()
    folder(bait, Canary(canary)) if name == "folder" else bait.write_bytes(FILES[name](Canary(canary)))
    for argv in command_lines(bait, tmp_path / "out"):
        code, text = world.run(argv)
        kind = "lost" if canary.exists() or code not in (0, 2, 3, 4) or "Traceback" in text else "refused"
        tally.add(kind if code else "survived", f"{argv[0]} {argv[-1]}: exit {code}: {text[-800:]}")
        canary.unlink(missing_ok=True)
