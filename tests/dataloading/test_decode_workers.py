"""Decode workers under signals, sudden death, and the end of their parent."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fusionreid.dataloading import Split, shared_memory
from fusionreid.dataloading.decode import BICUBIC
from fusionreid.dataloading.decode_workers import DecodeWorkers
from tests import ROOT
from tests.dataloading.test_loader import loader, make_split, worker_pids


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    return make_split(tmp_path_factory.mktemp("market"))


def test_workers_leave_signals_to_their_parent(split):
    train = loader(split, workers=2)
    batches = train.batches(0)
    next(batches), next(batches)  # one from each: both are up
    for pid in worker_pids(train):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
    assert len(list(batches)) == train.steps(0) - 2
    assert len(list(train.batches(1))) == train.steps(1)
    train.close()


def test_workers_end_when_the_loader_is_dropped(split):
    train = loader(split, workers=1)
    next(train.batches(0))
    (pid,) = worker_pids(train)
    del train
    assert not Path(f"/proc/{pid}").exists()


def test_a_killed_worker_is_an_error(split):
    train = loader(split, workers=1)
    next(train.batches(0))
    os.kill(worker_pids(train)[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="worker"):
        list(train.batches(1))
    train.close()


def test_a_full_disk_is_not_blamed_on_a_worker(tmp_path):
    def no_room(positions):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "bad.jpg").write_bytes(b"")
    pixels = DecodeWorkers([str(tmp_path / "bad.jpg")], (32, 16), BICUBIC, 0, fallback=no_room)
    with pytest.raises(OSError, match="No space left on device"):
        next(pixels([np.array([0])]))


STARTING = """
import signal, sys
from fusionreid.dataloading import read_split
from fusionreid.dataloading.config import DatasetsConfig
from tests.dataloading.test_loader import loader

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    train = loader(read_split(DatasetsConfig(NAMES="market", ROOT_DIR=sys.argv[1])), workers=2)
    print("starting", flush=True)
    print(len(list(train.batches(0))) == train.steps(0), flush=True)
    train.close()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_do_not_reach_the_server_while_it_starts(split, tmp_path, number):
    script = tmp_path / "starting.py"
    script.write_text(STARTING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, str(script), split.root], stdout=subprocess.PIPE, text=True,
                           env=environment, start_new_session=True)  # fmt: skip
    assert run.stdout.readline() == "starting\n"
    for _ in range(40):
        if run.poll() is None:
            os.killpg(run.pid, number)
        time.sleep(0.02)
    assert run.stdout.read() == "True\n"
    assert run.wait(30) == 0


RUN = """
import sys, time
from fusionreid.dataloading import read_split
from fusionreid.dataloading.config import DatasetsConfig
from tests.dataloading.test_loader import loader, worker_pids

if __name__ == "__main__":
    split = read_split(DatasetsConfig(NAMES="market", ROOT_DIR=sys.argv[1]))
    train = loader(split, workers=2)
    for batch in train.batches(0):
        print(*worker_pids(train), flush=True)
        if sys.argv[2] == "fail":
            raise RuntimeError("in the middle of an epoch")
        time.sleep(60)
"""


def test_workers_end_with_their_parent_however_it_ends(split, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py"), split.root]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.Popen([*command, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for how in ("fail", "sleep")
    ]
    pids = [int(pid) for run in runs for pid in run.stdout.readline().split()]
    assert len(pids) == 4
    runs[1].kill()
    assert "in the middle of an epoch" in runs[0].communicate(timeout=30)[1]
    runs[1].communicate(timeout=30)  # the pipes close when the last child has ended
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_too_little_shared_memory_is_told_before_workers_start(tmp_path, monkeypatch):
    """As in a container with Docker's 64 MB: a worker would die of SIGBUS, and the main process wait for it."""
    monkeypatch.setattr(shared_memory, "SHARED", Path("/proc"))  # has no room at all
    pixels = DecodeWorkers([str(tmp_path / "a.jpg")], (16, 16), BICUBIC, 2, fallback=lambda _: None)
    with pytest.raises(shared_memory.NoRoomForBatchesError, match="or set DATALOADER") as no:
        next(pixels([np.zeros(1, np.int64)]))
    assert no.value.exit_code == 6
    assert "2 decode workers need 0.00 GB" in str(no.value)
    check = shared_memory.check_shared_memory
    assert check(0, 2**40) == "decoding needs no shared memory"
    monkeypatch.setattr(shared_memory, "SHARED", tmp_path)
    free = shared_memory.shutil.disk_usage(tmp_path).free
    assert "decode workers need" in check(4, free // 100)
    assert check(10**6, free // 100, num_batches=2)  # never more than there are
    with pytest.raises(shared_memory.NoRoomForBatchesError):
        check(51, free // 100)
