"""A process that dies, hangs or loses its launcher ends the run with a message, and does not leave others waiting."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.distributed import peers
from tests import ROOT
from tests.runs import arguments

QUICK = """
import sys
sys.path[0] = {root!r}
from fusionreid.engine.distributed import peers
from fusionreid.engine.train import main
peers.INTERVAL_S, peers.SILENCE_S, peers.GRACE_S = 0.3, 8.0, 8.0
sys.exit(main())
"""
LONG = {"SOLVER__MAX_EPOCHS": 100_000, "SOLVER__EVAL_PERIOD": 100_000, "SOLVER__CHECKPOINT_PERIOD": 1}


class Running:
    """A long training on two processes, with a short patience, that has saved a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.output, script, log = folder / "out", folder / "quick.py", open(folder / "log.txt", "w")  # noqa: SIM115
        self.log = folder / "log.txt"
        script.write_text(QUICK.format(root=str(ROOT)))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        self.launcher = subprocess.Popen([*launcher, *arguments(folder, self.output, **LONG)], stdout=log, stderr=log,
                                         env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        self.workers: list[int] = []

    def begin(self) -> None:
        self.wait(lambda: ": saved " in self.log.read_text(), 120)
        found = subprocess.run(["pgrep", "-P", str(self.launcher.pid)], capture_output=True, text=True, check=True)
        self.workers = [int(pid) for pid in found.stdout.split()]
        assert len(self.workers) == 2

    def wait(self, is_so, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    @property
    def verdict(self) -> dict:
        return json.loads((self.output / "exit.json").read_text())

    def close(self) -> None:
        for pid in (*self.workers, self.launcher.pid):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    running = Running(tmp_path)
    try:
        running.begin()
        yield running
    finally:
        running.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_say_who_has_ended_or_hangs_and_where_the_run_goes_on(running: Running, number: int) -> None:
    os.kill(running.workers[1], number)
    running.wait(lambda: (running.output / "exit.json").exists(), 60)
    verb = "has ended" if number == signal.SIGKILL else "hangs"
    assert running.verdict["code"] == 7
    reason = running.verdict["reason"]
    assert reason.startswith(
        f"process 1 on host {socket.gethostname()} {verb}: start again, the run resumes from step "
    )
    step = int(reason.rpartition(" ")[2])
    assert f"step-{step:08d}" in [path.name for path in checkpoint.checkpoints(running.output / "checkpoints")]
    assert f"error: {reason}" in running.log.read_text()
    running.wait(lambda: not alive(running.workers[0]), 10)


def test_workers_of_a_killed_launcher_save_and_end(running: Running) -> None:
    os.kill(running.launcher.pid, signal.SIGKILL)
    running.wait(lambda: not any(map(alive, running.workers)), 60)
    assert (running.verdict["code"], running.verdict["reason"]) == (143, "stopped by SIGTERM")
    assert f"torchrun (process {running.launcher.pid}) has ended: stopping" in running.log.read_text()


def test_a_stopped_worker_does_not_keep_orphans_alive(running: Running) -> None:
    os.kill(running.workers[1], signal.SIGSTOP)
    os.kill(running.launcher.pid, signal.SIGKILL)
    running.wait(lambda: not alive(running.workers[0]), 60)
    assert running.verdict["code"] == 7
    assert running.verdict["reason"].startswith(f"torchrun (process {running.launcher.pid}) has ended: start again")


def test_one_whose_work_is_done_may_leave_before_the_others(tmp_path: Path) -> None:
    """As the second process of a search, of which the first prints what it found."""
    script = tmp_path / "leaving.py"
    script.write_text(f"""
import sys, time
sys.path[0] = {str(ROOT)!r}
from fusionreid.engine.distributed import parallel, peers
peers.INTERVAL_S, peers.SILENCE_S = 0.2, 1.0
ranks = parallel.start("cpu")
time.sleep(5 * ranks.main)
peers.stop(done=True)
""")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(launcher, check=True, timeout=120)


def test_no_thread_is_left_in_the_store_when_a_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would abort the process."""

    class SlowStore:
        def clone(self) -> "SlowStore":
            return self

        def set(self, key: str, value: str) -> None:
            pass

        def check(self, keys: list[str]) -> bool:
            return False

        def add(self, key: str, number: int) -> int:
            called.set()
            time.sleep(0.5)
            return 0

    called = threading.Event()
    monkeypatch.setattr(peers, "INTERVAL_S", 0.0)
    peers.start(SlowStore(), 0, 2)
    called.wait()
    peers.stop()
    assert "watch over peers" not in [thread.name for thread in threading.enumerate()]
