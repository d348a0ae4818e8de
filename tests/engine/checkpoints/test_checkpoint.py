"""Checkpoints are whole or not there: what is saved comes back bit for bit, through any kill and full disk."""

import errno
import os
import resource
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.retention import Progress
from fusionreid.engine.storage import StorageError


def contents(step: int) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(step)
    model = {"conv.weight": torch.randn(2, 3, 2, 2, generator=generator), "bn.steps": torch.tensor(step)}
    momentum = {"conv.weight/momentum_buffer": torch.randn(2, 3, 2, 2, generator=generator)}
    return {"model": model, "optimizer": momentum}, {"epoch": 3, "best": 0.25, "config": "SOLVER: é"}


def save(root: Path, step: int) -> Path:
    return checkpoint.save(root, step, *contents(step))


def assert_is(path: Path | None, *steps: int) -> None:
    assert path is not None
    tensors, state = checkpoint.load(path)
    assert state["step"] in steps
    assert state["config"] == "SOLVER: é"
    for part, entries in contents(state["step"])[0].items():
        assert entries.keys() == tensors[part].keys()
        assert all(torch.equal(tensors[part][key], value) for key, value in entries.items())


def test_every_bit_comes_back(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    bits = torch.arange(-(2**31), 2**31, 2**17).to(torch.int32)
    entries = {
        "nan": bits.view(torch.float32), "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "shared": shared, "view": shared.T, "empty": torch.zeros(0, 3), "scalar": torch.tensor(7),
        "bf16": torch.randn(5).bfloat16(), "flags": torch.tensor([True, False]), "leaf": torch.ones(2).requires_grad_(),
    }  # fmt: skip
    path = checkpoint.save(tmp_path / "checkpoints", 12, {"model": entries, "none": {}}, {"seed": 1111})
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-00000012"]
    tensors, state = checkpoint.load(path)
    assert tensors["none"] == {}
    assert (state["format"], state["step"], state["seed"]) == (1, 12, 1111)
    loaded = tensors["model"]
    assert torch.equal(loaded.pop("nan").view(torch.int32), bits)
    for key, value in loaded.items():
        assert (value.dtype, value.shape) == (entries[key].dtype, entries[key].shape)
        assert torch.equal(value, entries[key])
    loaded["leaf"].fill_(5)  # memory of its own
    assert load_file(path / "model.safetensors")["leaf"].tolist() == [1, 1]


class Killed(BaseException):
    pass


def test_a_kill_between_two_renames_costs_no_checkpoint_of_a_step_that_is_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 alone is there, as after a signal in the last step of an epoch, and is saved once more."""
    whole = save(tmp_path, 3)
    renames = iter((os.rename,))

    def rename(source: Path, target: Path) -> None:
        try:
            next(renames)(source, target)
        except StopIteration:
            raise Killed from None

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nothing runs after a kill
        with pytest.raises(Killed):
            save(tmp_path, 3)
    assert not whole.exists()
    checkpoint.clean(tmp_path)
    assert_is(checkpoint.latest(tmp_path), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("step", [2, 3])  # 2: replaces one of the same step; 3: a new one, which purges the first
def test_a_kill_at_any_call_leaves_the_newest_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    places = [(os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (checkpoint, "save_file"),
              (Path, "mkdir"), (Path, "write_text"), (Path, "write_bytes")]  # fmt: skip
    kills, done = 0, False
    while not done:
        root, calls = tmp_path / f"{kills}", 0
        save(root, 1), save(root, 2)

        def dying(call, last=kills + 1):
            def wrapped(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls >= last:  # nothing runs after the kill, so what would clean up does not either
                    raise Killed
                return call(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for place, name in places:
                patch.setattr(place, name, dying(getattr(place, name)))
            try:
                save(root, step), checkpoint.write_progress(root, Progress(step, step, 0.5))
                checkpoint.purge(root, step)
                done = True
            except Killed:
                kills += 1
        assert all(checkpoint.verify(path) for path in checkpoint.checkpoints(root))
        checkpoint.clean(root)
        assert_is(checkpoint.latest(root), 2, step)
        assert not list(root.glob(".tmp-*"))
        assert_is(save(root, step), step)
    assert kills > 12


def test_a_kill_at_any_byte(tmp_path: Path) -> None:
    save(tmp_path, 1)
    largest = max(file.stat().st_size for file in save(tmp_path, 9).iterdir())
    shutil.rmtree(tmp_path / "step-00000009")
    for limit in (largest * i // 50 for i in range(51)):
        child = os.fork()
        if not child:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # writing the byte after the limit kills
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                save(tmp_path, 2)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (-signal.SIGXFSZ if limit < largest else 0)
        assert_is(checkpoint.latest(tmp_path), 1 if limit < largest else 2)
    checkpoint.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


FULL = [(checkpoint, "save_file", errno.ENOSPC), (os, "fsync", errno.EIO), (os, "rename", errno.EROFS)]


@pytest.mark.parametrize(("place", "name", "code"), FULL)
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place, name: str, code: int) -> None:
    save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        with pytest.raises(StorageError, match=f"step-00000002.*{os.strerror(code)}.*MiB needed, .*MiB free") as caught:
            save(tmp_path, 2)
    assert caught.value.exit_code == 4
    assert_is(checkpoint.latest(tmp_path), 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_no_room_is_seen_beforehand_and_a_file_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        save(tmp_path / "file", 1)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(checkpoint, "save_file", None)  # must not be reached
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(sum(
        t.nbytes for part in contents(1)[0].values() for t in part.values())))  # fmt: skip
    with pytest.raises(StorageError, match="No space left"):
        save(tmp_path, 1)


def test_last_two_and_best_are_kept_by_step_not_by_clock(tmp_path: Path) -> None:
    """Row 36 too: the clock may jump."""
    assert checkpoint.latest(tmp_path / "none") is None
    assert checkpoint.best(tmp_path) is None
    spared: list[int] = []
    for step in (5, 20, 100, 3_000_000, 200_000_000):
        path = save(tmp_path, step)
        os.utime(path, (10**9 - step, 10**9 - step))
        if step == 20:
            spared = [20]
        checkpoint.purge(tmp_path, step, spared)
    (tmp_path / "step-notes").mkdir()
    assert [int(p.name[5:]) for p in checkpoint.checkpoints(tmp_path)] == [20, 3_000_000, 200_000_000]
    assert_is(checkpoint.latest(tmp_path), 200_000_000)
    checkpoint.purge(tmp_path, 200_000_000, [3_000_000], keep=1)
    assert [int(p.name[5:]) for p in checkpoint.checkpoints(tmp_path)] == [3_000_000, 200_000_000]
