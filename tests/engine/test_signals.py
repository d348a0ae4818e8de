"""Signals: the first lets a step finish, the second does not, and a main thread that waits inside C is not deaf."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fusionreid.engine.signals import REPEAT_S, Stop
from tests.programs import start


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    (tmp_path / "run.yml").write_text("")
    (tmp_path / "out").mkdir()
    return ["--config_file", str(tmp_path / "run.yml"), "OUTPUT_DIR", str(tmp_path / "out")]


def reason(argv: list[str]) -> str:
    return json.loads((Path(argv[-1]) / "exit.json").read_text())["reason"]


def ready(child: subprocess.Popen[str]) -> None:
    """Wait until the work has begun."""
    assert child.stdout.readline() == "False\n"
    assert child.stdout.readline() == "ready\n"


GRACEFUL = """
from fusionreid.engine.signals import Stop
with Stop() as stop:
    print("ready", flush=True)
    while not stop.requested: time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(LAST_STEP)
    raise SystemExit(128 + stop.flag)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_lets_the_step_finish_and_a_second_one_does_not(argv, number: int, code: int) -> None:
    for last_step in (0.3, 60):
        child = start(argv, GRACEFUL.replace("LAST_STEP", str(last_step)))
        ready(child)
        child.send_signal(number)
        assert child.stdout.readline() == "saving\n"
        child.send_signal(number)  # passed on by a launcher: the same one
        if last_step == 60:
            time.sleep(REPEAT_S + 0.2)
            child.send_signal(number)
        assert child.wait(10) == code
        assert (Path(argv[-1]) / "exit.json").exists() == (last_step != 60)


DEAF = """
import ctypes
mutex = ctypes.create_string_buffer(64)
print("ready", flush=True)
for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(mutex)  # waits for itself: as for a peer that is gone
"""


@pytest.mark.parametrize("body", ['print("ready", flush=True)\ntime.sleep(60)', DEAF], ids=["waiting", "inside C"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_command_without_a_graceful_stop_ends_at_once(argv, body: str, number: signal.Signals) -> None:
    child = start(argv, body)
    ready(child)
    child.send_signal(number)
    assert child.wait(10) == 128 + number
    assert reason(argv) == f"stopped by {number.name}"


def test_a_second_signal_ends_a_graceful_stop_that_waits_inside_c(argv) -> None:
    stop = "from fusionreid.engine.signals import Stop\nwith Stop():\n    "
    child = start(argv, stop + DEAF.strip().replace("\n", "\n    "))
    ready(child)
    child.terminate()
    time.sleep(REPEAT_S + 0.2)
    assert child.poll() is None
    child.terminate()
    assert child.wait(10) == 143


def test_the_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Stop() as outer:
        with Stop() as stop:
            assert (stop.requested, stop.flag) == (None, 0)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(stop)
            assert (stop.flag, outer.flag) == (signal.SIGTERM, 0)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(outer)
        assert outer.flag == signal.SIGUSR1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_to_a_forked_child_is_not_its_parents() -> None:
    with Stop() as stop:
        if not (child := os.fork()):
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        time.sleep(0.1)
        assert stop.flag == 0


def wait_for(stop: Stop) -> None:
    limit = time.monotonic() + 5
    while not stop.requested and time.monotonic() < limit:
        time.sleep(0.001)
