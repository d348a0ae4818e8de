"""However a command ends: one clear message, its exit code, and both in exit.json."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fusionreid.engine import command
from fusionreid.engine.checkpoints.checkpoint import CheckpointError, DamagedError
from fusionreid.engine.command import OutputFolderError, Stop, lock
from fusionreid.engine.storage import StorageError
from tests import ROOT


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    (tmp_path / "run.yml").write_text("SOLVER:\n  IMS_PER_BATCH: 64\nDATALOADER:\n  NUM_INSTANCE: 4\n")
    (tmp_path / "out").mkdir()
    return ["--config_file", str(tmp_path / "run.yml"), "OUTPUT_DIR", str(tmp_path / "out")]


def exit_json(argv: list[str]) -> dict:
    return json.loads((Path(argv[-1]) / "exit.json").read_text())


def raising(error: BaseException):
    def work(_cfg) -> None:
        raise error

    return work


class FromBelow(BaseException):
    """As torch.distributed.checkpoint.CheckpointException, which `except Exception` does not see."""


@pytest.mark.parametrize(("error", "code", "text"), [
    (CheckpointError("of another format"), 3, "error: of another format"),
    (DamagedError("model.safetensors is damaged"), 3, "error: model.safetensors is damaged"),
    (StorageError("no room"), 4, "error: no room"),
    (OSError(28, "No space left on device", "report.html"), 4, "'report.html': make room"),
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
    """Row 32 too: out of memory says the peak, the batch and half of it."""
    assert command.run(raising(error), argv) == code
    err = capsys.readouterr().err
    assert text in err
    assert ("Traceback" in err) == (code == 1)
    written = exit_json(argv)
    assert (written["code"], written["command"]) == (code, "work")
    assert written["reason"] in err


def test_success_arguments_and_flags(argv, capsys) -> None:
    seen = []

    def work(cfg, *, fast: bool) -> None:
        seen.append((cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH, fast))

    (Path(argv[-1]) / "exit.json").write_text("stale")
    overrides = ["SOLVER.BASE_LR", "1e-2", "--fast", "SOLVER.IMS_PER_BATCH=32"]
    assert command.run(work, [*argv[:2], *overrides, *argv[2:]], {"--fast": "be fast"}) == 0
    assert command.run(work, argv, {"--fast": "be fast"}) == 0
    assert seen == [(0.01, 32, True), (0.005, 64, False)]
    assert exit_json(argv) == {"code": 0, "reason": "done", "command": "work", "rank": 0}
    assert command.run(work, [*argv, "--print-config"]) == 0
    assert "IMS_PER_BATCH: 64" in capsys.readouterr().out
    for wrong in (["--confg_file", "x"], []):
        with pytest.raises(SystemExit, match="2"):
            command.run(work, wrong)


def test_the_first_reason_stays_and_other_ranks_report_failures_only(argv, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "RANK", 1)
    assert command.run(lambda _: 0, argv) == 0
    assert not (Path(argv[-1]) / "exit.json").exists()
    assert command.run(raising(DamagedError("cut")), argv) == 3
    assert command.run(raising(SystemExit(143)), argv) == 143  # torchrun ends the others because one failed
    assert (exit_json(argv)["code"], exit_json(argv)["rank"]) == (3, 1)
    assert capsys.readouterr().err == "[rank 1] error: cut\n[rank 1] stopped by SIGTERM\n"


PROGRAM = """
import os, sys, time
from fusionreid.engine import command
def train(cfg):
    print("torch" in sys.modules, flush=True)
    BODY
sys.exit(command.run(train))
"""


def start(argv: list[str], body: str, **options) -> subprocess.Popen:
    body = PROGRAM.replace("BODY", body.strip().replace("\n", "\n    "))
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-c", body, *argv], cwd=ROOT, **options)


def test_a_mistake_in_the_configuration_shows_before_torch_loads(argv) -> None:
    child = start([*argv, "SOLVER.BASE_LRR", "0.1"], "pass")
    out, err = child.communicate()
    assert (child.returncode, out) == (2, "")
    assert "did you mean SOLVER.BASE_LR" in err
    child = start(argv, "pass")
    assert child.communicate()[0] == "False\n"
    assert child.returncode == 0


GRACEFUL = """
stop = command.Stop()
print("ready", flush=True)
while not stop.requested: time.sleep(0.01)
print("saving", flush=True)
time.sleep(LAST_STEP)
raise SystemExit(128 + stop.flag)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_row_2_a_signal_lets_the_step_finish_and_a_second_one_does_not(argv, number: int, code: int) -> None:
    for last_step in (0.3, 60):
        child = start(argv, GRACEFUL.replace("LAST_STEP", str(last_step)))
        assert [child.stdout.readline(), child.stdout.readline()][1] == "ready\n"
        child.send_signal(number)
        assert child.stdout.readline() == "saving\n"
        child.send_signal(number)  # passed on by a launcher: the same one
        if last_step == 60:
            time.sleep(command.REPEAT_S + 0.2)
            child.send_signal(number)
        assert child.wait(10) == code
        assert (Path(argv[-1]) / "exit.json").exists() == (last_step != 60)


def test_a_command_without_a_graceful_stop_ends_too(argv) -> None:
    child = start(argv, "time.sleep(60)")
    child.stdout.readline()
    child.terminate()
    assert child.wait(10) == 143
    assert exit_json(argv)["reason"] == "stopped by SIGTERM"
    before = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        assert (stop.requested, stop.flag) == (None, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.flag == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


def test_row_33_two_runs_in_one_folder(argv, tmp_path: Path) -> None:
    output = Path(argv[-1])
    body = "from pathlib import Path\nheld = command.lock(Path(cfg.OUTPUT_DIR))\n"
    first = start(
        argv, body + "worker = os.fork()\nif worker: print(worker, flush=True)\ntime.sleep(60)"
    )  # a worker outlives its run
    first.stdout.readline()
    worker = int(first.stdout.readline())
    second = start(argv, body)
    err = second.communicate()[1]
    assert second.returncode == 2
    assert f"in use by process {first.pid} on {os.uname().nodename}: wait for it or set another OUTPUT_DIR" in err
    assert not (output / "exit.json").exists()  # that is the first run's to write
    first.kill()
    first.wait()
    lock(output).close()  # a dead owner's lock is free at once
    os.kill(worker, signal.SIGKILL)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match=r"OUTPUT_DIR .*file cannot be written: .*; set another one") as caught:
        lock(tmp_path / "file")
    assert caught.value.exit_code == 2


SHELLS = {'"$@" >&-': 0, '"$@" | true; exit ${PIPESTATUS[0]}': 1, 'LANG=C LC_ALL=C "$@" >/dev/full': 1}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("shell", SHELLS)
def test_row_40_stdout_without_a_reader(argv, shell: str, unbuffered: str) -> None:
    body = PROGRAM.replace("BODY", "time.sleep(0.1)\n    for _ in range(9): print('größe' * 999)")
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", body, *argv]
    done = subprocess.run(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("standard output cannot be written") == len(done.stderr.splitlines()) == SHELLS[shell]
    assert exit_json(argv)["code"] == 0


@pytest.mark.parametrize("shell", ['"$@" 2>&-', '"$@" 2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}'])
def test_row_40_stderr_without_a_reader(argv, shell: str) -> None:
    body = PROGRAM.replace("BODY", "import logging; logging.warning('dropped'); print('so is this', file=sys.stderr)")
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", body, "SOLVER.MARGIN", "0.5", *argv]  # worth a note
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
    assert exit_json(argv)["code"] == 0
