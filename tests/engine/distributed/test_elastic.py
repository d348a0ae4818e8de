"""A worker that dies is started again with its peers by torchrun, and the run goes on from its checkpoint by itself."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from fusionreid.engine.checkpoints import checkpoint
from tests.runs import arguments, command, finish


def test_a_killed_worker_costs_no_more_than_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = command(*arguments(tmp_path, output), processes=2, restarts=1)
    while run.poll() is None and not checkpoint.checkpoints(output / "checkpoints"):
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    code, text = finish(run)
    assert code == 0, text
    assert "resumed from" in text
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
