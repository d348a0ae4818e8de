"""`pytest bench --benchmark-only` has small cases and ends on a signal: nothing in it takes the process's signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.test_bench import DEVICE, SETTINGS
from tests import ROOT


def test_cases_are_small_on_a_cpu() -> None:
    assert SETTINGS.size == ("default" if DEVICE.type == "cuda" else "quick")


@pytest.mark.slow
def test_a_signal_ends_it_in_the_middle_of_a_training_step(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-k", "training"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    run = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while run.poll() is None and not list(tmp_path.glob("*/log/manifest.json")):  # there once a trainer is ready
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=20) == -signal.SIGTERM
