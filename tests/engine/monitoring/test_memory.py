"""Out of memory: exit 6, the peak, the batch, and one that fits by a linear estimate."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusionreid.engine.config import Config
from fusionreid.engine.embed import main as embed
from fusionreid.engine.evaluate import main as evaluate
from fusionreid.engine.monitoring import memory
from fusionreid.engine.monitoring.memory import fitting_batch, ran_out
from fusionreid.engine.train import main as train
from fusionreid.engine.training.train_step import TrainStep
from tests.runs import ROOT, arguments

GIB = 2**30


def config(batch: int, instances: int = 16, accumulate: int = 1) -> Config:
    solver = {"IMS_PER_BATCH": batch, "ACCUMULATE": accumulate}
    return Config.from_dict({"SOLVER": solver, "DATALOADER": {"NUM_INSTANCE": instances}})


def test_the_estimate_is_linear_beyond_what_was_loaded() -> None:
    cfg = config(128)  # 10 GiB loaded, 100 GiB needed: 0.703 GiB an image, 78 of which fill 55 GiB
    assert fitting_batch(cfg, 10 * GIB, 100 * GIB, 65 * GIB, share=1.0) == 64
    assert fitting_batch(cfg, 10 * GIB, 100 * GIB, 67 * GIB, share=1.0) == 80
    assert fitting_batch(cfg, 10 * GIB, 100 * GIB, 100 * GIB, share=0.9) == 112
    assert fitting_batch(cfg, 10 * GIB, 9 * GIB, 9 * GIB, share=0.5) == 64, "a peak that lags behind tells nothing"
    assert fitting_batch(cfg, 10 * GIB, 100 * GIB, 100 * GIB, share=1.0) == 112  # less than what did not fit
    assert fitting_batch(cfg, 10 * GIB, 100 * GIB, 20 * GIB, share=1.0) == 32  # two persons, the least
    assert fitting_batch(config(32), 0, GIB, GIB, share=0.5) is None


@pytest.mark.parametrize(("processes", "instances", "accumulate", "fits"), [
    (1, 16, 1, 64), (2, 16, 1, 64), (3, 16, 1, 48), (1, 12, 8, 72), (4, 4, 3, 48)
])  # fmt: skip
def test_what_fits_is_whole_persons_and_chunks_on_every_process(
    monkeypatch: pytest.MonkeyPatch, processes: int, instances: int, accumulate: int, fits: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    batch = 144 if 144 % (processes * instances) == 0 else 128
    assert fitting_batch(config(batch, instances, accumulate), 0, 100, 100, share=72 / batch) == fits


def test_what_is_about_memory_and_what_is_not() -> None:
    assert all(map(ran_out, (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), OSError(12, "no"))))
    assert ran_out(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"))
    assert not any(map(ran_out, (RuntimeError("a shape"), ValueError("out of memory"), OSError(28, "no"))))


def test_peak_and_what_is_held_follow_what_is_allocated() -> None:
    script = """
import torch
from fusionreid.engine.monitoring import memory
before = memory.held()
block = torch.ones(64 * 2**20 // 4)
assert memory.held() - before > 60 * 2**20
assert memory.peak() >= before + 60 * 2**20
"""  # in a process of its own: one that has freed much takes the block from there
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize(("error", "asked"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a"), "2.50 GiB"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes"), "1.00 GiB"),
    (MemoryError(), None),
])  # fmt: skip
@pytest.mark.parametrize("failing_step", [0, 2])
def test_a_step_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, error: Exception, asked: str | None, failing_step: int
) -> None:
    whole = TrainStep.__call__

    def step(self: TrainStep, batch: object, number: int, stop: int = 0) -> None:
        if number == failing_step:
            raise error
        whole(self, batch, number, stop)

    monkeypatch.setattr(TrainStep, "__call__", step)
    assert train(arguments(tmp_path, tmp_path / "out", SOLVER__IMS_PER_BATCH=32)) == 6
    said = json.loads((tmp_path / "out/exit.json").read_text())
    assert said["code"] == 6
    assert said["reason"] in capfd.readouterr().err
    batch = 28 if failing_step else 16  # of four images a person: half of a batch whose first step was never whole
    assert f"training with SOLVER.IMS_PER_BATCH 32: try {batch}, by an estimate" in said["reason"]
    assert (f"GiB when {asked} more were asked for" in said["reason"]) == (asked is not None)
    assert "evaluating" not in said["reason"]
    assert not list((tmp_path / "out").glob("checkpoints/.tmp*"))


def test_an_evaluation_that_does_not_fit_speaks_of_its_own_batch(tmp_path: Path, monkeypatch, capfd) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fusionreid.engine.training.trainer.evaluate", fail)
    assert train(arguments(tmp_path, tmp_path / "out", SOLVER__MAX_EPOCHS=1, SOLVER__WARMUP_ITERS=0)) == 6
    reason = capfd.readouterr().err
    assert "evaluating with TEST.IMS_PER_BATCH 128: try 64" in reason
    assert "training with" not in reason


def test_evaluate_and_embed_speak_of_their_batch_alone(tmp_path: Path, monkeypatch, capfd) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes")

    monkeypatch.setattr("fusionreid.engine.reporting.evaluate_run.evaluate_checkpoint", fail)
    monkeypatch.setattr("fusionreid.engine.evaluation.extract.embed_to_folder", fail)
    folders = ["--images", "x", "--output", str(tmp_path / "y")]
    for main, more in ((evaluate, []), (embed, folders)):
        assert main([*arguments(tmp_path, tmp_path / "out"), *more]) == 6
        reason = capfd.readouterr().err
        assert "evaluating with TEST.IMS_PER_BATCH 128: try 64" in reason
        assert "training with" not in reason


class Device:
    """80 GiB, of which 70 were in use."""

    max_memory_allocated = staticmethod(lambda: 70 * GIB)
    mem_get_info = staticmethod(lambda: (5 * GIB, 80 * GIB))
    memory_reserved = staticmethod(lambda: 75 * GIB)

    class memory:
        _dump_snapshot = staticmethod(lambda path: Path(path).write_bytes(b"blocks"))


@pytest.mark.parametrize(("error", "place"), [
    (MemoryError(), "host"), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "host"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "GPU"),
])  # fmt: skip
def test_beside_a_gpu_the_host_has_remedies_of_its_own(monkeypatch, error: Exception, place: str) -> None:
    """10 of the 70 GiB held the model, and 2 more were asked for."""
    monkeypatch.setattr(memory, "_cuda", Device)
    text = memory.advice(error, config(128, instances=4), phase="training", loaded=10 * GIB, finished_steps=3)
    assert text.startswith(f"out of {place} memory")
    assert ("NUM_WORKERS" in text) == (place == "host")
    if place == "GPU":  # nine tenths of a batch that did not fit by little
        assert "peak 70.00 GiB when 2.00 GiB more were asked for" in text
        assert "SOLVER.IMS_PER_BATCH 128: try 112, by an estimate" in text


def test_a_record_that_is_broken_off_says_what_it_ran_out_of() -> None:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        finally:
            raise RuntimeError("CUDA error: capturing stream has unjoined work")
    except RuntimeError as error:
        with pytest.raises(memory.OutOfMemory, match=r"2\.00 GiB more were asked for; training with .* try 16, by"):
            memory.explain(error, "training", config(32, instances=4))


@pytest.mark.parametrize(("error", "place"), [
    (MemoryError(), "host"), (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "GPU"),
])  # fmt: skip
def test_what_a_full_gpu_held_lies_beside_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    monkeypatch.setattr(memory, "_cuda", Device)
    monkeypatch.setenv("RANK", "3")
    cfg = Config.from_dict({"OUTPUT_DIR": str(tmp_path)})
    with pytest.raises(memory.OutOfMemory) as told:
        memory.explain(error, "training", cfg)
    written = [path.name for path in tmp_path.iterdir()]
    assert written == (["gpu_memory-rank3.pickle"] if place == "GPU" else [])
    assert all(name in str(told.value) for name in written)
    with pytest.raises(memory.OutOfMemory, match=r"GPU memory|host memory"):
        memory.explain(error, "training", Config.from_dict({"OUTPUT_DIR": str(tmp_path / "absent")}))


def test_it_loads_without_torch() -> None:
    code = "import sys, fusionreid.engine.monitoring.memory as m; m.peak(); m.held(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
