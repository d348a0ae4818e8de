"""However a command ends: one clear message, its exit code, and both in exit.json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusionreid.engine import command
from fusionreid.engine.arguments import Command, Ending
from fusionreid.engine.checkpoints.checkpoint import CheckpointError, DamagedError
from fusionreid.engine.storage import OutputFolderError, StorageError
from tests import ROOT
from tests.programs import program, start


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    (tmp_path / "run.yml").write_text("SOLVER:\n  IMS_PER_BATCH: 64\nDATALOADER:\n  NUM_INSTANCE: 4\n")
    (tmp_path / "out").mkdir()
    return ["--config_file", str(tmp_path / "run.yml"), "OUTPUT_DIR", str(tmp_path / "out")]


def exit_json(argv: list[str]) -> dict:
    return json.loads((Path(argv[-1]) / "exit.json").read_text())


def raising(error: BaseException) -> Command:
    def work(_cfg) -> None:
        raise error

    return Command(work, "", "", [])


class FromBelow(BaseException):
    """As torch.distributed.checkpoint.CheckpointException, which `except Exception` does not see."""


@pytest.mark.parametrize(("error", "code", "text"), [
    (CheckpointError("of another format"), 3, "error: of another format"),
    (DamagedError("model.safetensors is damaged"), 3, "error: model.safetensors is damaged"),
    (StorageError("no room"), 4, "error: no room"),
    (OSError(28, "No space left on device", "report.html"), 4, "'report.html': make room"),
    (IsADirectoryError(21, "Is a directory", "metrics.json"), 4, "'metrics.json': remove what is in its place"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 6, "SOLVER.IMS_PER_BATCH 64: try 32"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate"), 6, "host memory, peak"),
    (MemoryError(), 6, "IMS_PER_BATCH 64: try 32, by an estimate"),
    (OSError(12, "Cannot allocate memory"), 6, "; evaluating with TEST.IMS_PER_BATCH 256: try 128"),
    (KeyboardInterrupt(), 130, "stopped by SIGINT"),
    (SystemExit(143), 143, "stopped by SIGTERM"),
    (RuntimeError("a shape"), 1, "Traceback"),
    (FromBelow("rank 1 failed"), 1, "error: FromBelow: rank 1 failed"),
])  # fmt: skip
def test_every_failure_has_its_code_and_reason(argv, capsys, error: BaseException, code: int, text: str) -> None:
    """Out of memory says the peak, the batch and half of it."""
    assert command.run(raising(error), argv) == code
    err = capsys.readouterr().err
    assert text in err
    assert ("Traceback" in err) == (code == 1)
    written = exit_json(argv)
    assert (written["code"], written["command"]) == (code, "work")
    assert written["reason"] in err


def test_a_command_gets_its_options_and_says_what_comes_next(argv, capsys) -> None:
    seen = []

    def work(cfg, *, fast: bool) -> None:
        seen.append((cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH, fast))

    about = Command(
        work, "", "", [], lambda parser: parser.add_argument("--fast", action="store_true"),
        ending=lambda cfg, *, fast: Ending([Path("model.onnx")], "evaluate"),
    )  # fmt: skip
    (Path(argv[-1]) / "exit.json").write_text("stale")
    overrides = ["SOLVER.BASE_LR", "1e-2", "--fast", "SOLVER.IMS_PER_BATCH=32"]
    assert command.run(about, [*argv[:2], *overrides, *argv[2:]]) == 0
    err = capsys.readouterr().err
    assert "INFO wrote model.onnx" in err
    words = f"{' '.join(argv[:2])} SOLVER.BASE_LR 1e-2 SOLVER.IMS_PER_BATCH=32 {' '.join(argv[2:])}"
    assert f"INFO next: fusionreid evaluate {words}" in err
    assert command.run(about, argv) == 0
    assert seen == [(0.01, 32, True), (0.005, 64, False)]
    assert exit_json(argv) == {"code": 0, "reason": "done", "command": "work", "rank": 0}
    capsys.readouterr()
    assert command.run(about, [*argv, "--print-config"]) == 0
    out, err = capsys.readouterr()
    assert "IMS_PER_BATCH: 64" in out
    assert "next:" not in err
    for wrong in (["--confg_file", "x"], []):
        with pytest.raises(SystemExit, match="2"):
            command.run(about, wrong)


def test_the_first_reason_stays_and_other_ranks_report_failures_only(argv, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "RANK", 1)
    assert command.run(Command(lambda _: 0, "", "", []), argv) == 0
    assert not (Path(argv[-1]) / "exit.json").exists()
    assert command.run(raising(DamagedError("cut")), argv) == 3
    assert command.run(raising(SystemExit(143)), argv) == 143  # torchrun ends the others because one failed
    assert (exit_json(argv)["code"], exit_json(argv)["rank"]) == (3, 1)
    assert capsys.readouterr().err == "[rank 1] error: cut\n[rank 1] stopped by SIGTERM\n"


def test_a_disk_that_is_full_leaves_no_empty_exit_json(argv, full_disk, capsys) -> None:
    assert command.run(raising(StorageError("no room")), argv) == 4
    assert list(Path(argv[-1]).glob("*exit*")) == []
    err = capsys.readouterr().err
    assert "error: no room" in err
    assert "exit.json cannot be written" in err


def test_a_folder_of_another_run_gets_no_exit_json(argv) -> None:
    assert command.run(raising(OutputFolderError("in use")), argv) == 2
    assert not (Path(argv[-1]) / "exit.json").exists()


def test_a_mistake_in_the_configuration_shows_before_torch_loads(argv) -> None:
    child = start([*argv, "SOLVER.BASE_LRR", "0.1"], "pass")
    out, err = child.communicate()
    assert (child.returncode, out) == (2, "")
    assert "did you mean SOLVER.BASE_LR" in err
    child = start(argv, "pass")
    assert child.communicate()[0] == "False\n"
    assert child.returncode == 0


SHELLS = {'"$@" >&-': 0, '"$@" | true; exit ${PIPESTATUS[0]}': 1, 'LANG=C LC_ALL=C "$@" >/dev/full': 1}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("shell", SHELLS)
def test_stdout_without_a_reader(argv, shell: str, unbuffered: str) -> None:
    body = program("time.sleep(0.1)\nfor _ in range(9): print('größe' * 999)")
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", body, *argv]
    done = subprocess.run(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("standard output cannot be written") == len(done.stderr.splitlines()) == SHELLS[shell]
    assert exit_json(argv)["code"] == 0


@pytest.mark.parametrize("shell", ['"$@" 2>&-', '"$@" 2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}'])
def test_stderr_without_a_reader(argv, shell: str) -> None:
    body = program("import logging; logging.warning('dropped'); print('so is this', file=sys.stderr)")
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", body, "SOLVER.MARGIN", "0.5", *argv]  # worth a note
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
    assert exit_json(argv)["code"] == 0
