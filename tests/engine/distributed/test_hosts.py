"""Two hosts for real: each a network, process and mount namespace of this machine, joined by a cable."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionreid.dataloading import read_split
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import load_config
from fusionreid.engine.evaluation import embeddings
from tests import ROOT
from tests.runs import arguments

NAMES = "fusionreid-a", "fusionreid-b"
SCRIPT = """
import sys
sys.path[0] = {root!r}
from importlib import import_module
from fusionreid.engine.distributed import peers
peers.INTERVAL_S, peers.SILENCE_S = 0.3, 8.0
command = import_module(f"fusionreid.engine.{{sys.argv[1]}}")
sys.exit(command.main(sys.argv[2:]))
"""


def can_make_hosts() -> bool:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare"))):
        return False
    made = subprocess.run(["ip", "netns", "add", f"{NAMES[0]}-try"], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", f"{NAMES[0]}-try"], capture_output=True, check=False)
    return made


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_hosts(), reason="needs root, iproute2 and unshare to make two hosts"),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Two hosts of one process each; `disks` is what each sees as the output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out"
        self.output.mkdir()
        (folder / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "cable-a", "netns", NAMES[0], "type", "veth", "peer", "name", "cable-b", "netns", NAMES[1])
        for number, (name, cable) in enumerate(zip(NAMES, ("cable-a", "cable-b")), 1):
            ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", cable)
            ip("-n", name, "link", "set", "lo", "up")
        self.plug("up")
        self.runs: list[subprocess.Popen[str]] = []

    def plug(self, state: str) -> None:
        for name, cable in zip(NAMES, ("cable-a", "cable-b")):
            ip("-n", name, "link", "set", cable, state)

    def start(self, command: str, argv: list[str], *, shared: bool = True) -> None:
        self.runs = []
        for rank, (name, cable) in enumerate(zip(NAMES, ("cable-a", "cable-b"))):
            disk = self.output if shared else self.folder / f"disk-{rank}"
            disk.mkdir(exist_ok=True)
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank),
                        "--nproc-per-node", "1", "--master-addr", "10.213.7.1", "--master-port", "29713",
                        str(self.folder / "script.py"), command, *argv]  # fmt: skip
            inside = f'hostname {name} && mount --bind {disk} {self.output} && exec "$@"'
            host = ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc",
                    "--kill-child", "sh", "-c", inside, "sh"]  # fmt: skip
            with open(self.folder / f"log-{rank}.txt", "w") as log:
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": cable}
                self.runs.append(subprocess.Popen([*host, *launcher], env=environment, stdout=log, stderr=log))

    def log(self, rank: int) -> str:
        return (self.folder / f"log-{rank}.txt").read_text()

    def wait(self, is_so, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, self.log(0) + self.log(1)
            time.sleep(0.05)

    def finish(self) -> list[int]:
        return [run.wait(timeout=240) for run in self.runs]

    def close(self) -> None:
        for run in self.runs:
            if run.poll() is None:
                run.kill()  # and with it all processes of the host
                run.wait()
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path)
    try:
        yield hosts
    finally:
        hosts.close()


def test_a_run_outlives_the_loss_of_a_host(hosts: Hosts, tmp_path: Path) -> None:
    """Train, cut the cable of one host, resume on both, evaluate on both."""
    argv = arguments(tmp_path, hosts.output, SOLVER__MAX_EPOCHS=15, SOLVER__EVAL_PERIOD=15)
    hosts.start("train", argv)
    hosts.wait(lambda: ": saved " in hosts.log(0))
    hosts.plug("down")
    hosts.wait(lambda: (hosts.output / "exit.json").exists(), 60)
    hosts.runs[1].send_signal(signal.SIGKILL)
    assert hosts.finish()[0] != 0
    verdict = json.loads((hosts.output / "exit.json").read_text())
    assert verdict["code"] == 7
    assert f"process 1 on host {NAMES[1]} has ended or hangs: start again, the run goes on from step" in hosts.log(0)
    hosts.plug("up")
    hosts.start("train", argv)
    assert hosts.finish() == [0, 0], hosts.log(0) + hosts.log(1)
    assert "resumed from" in hosts.log(0)
    hosts.start("evaluate", argv)
    assert hosts.finish() == [0, 0], hosts.log(0) + hosts.log(1)
    assert len(list((hosts.output / "embeddings").glob("features-*-of-00002.npy"))) == 2
    stored = embeddings.load(hosts.output / "embeddings")
    assert stored.features.isfinite().all()
    assert len(stored.records) == len(stored.features)


def test_hosts_that_do_not_share_the_output_folder_are_told(hosts: Hosts, tmp_path: Path) -> None:
    """Before an evaluation and before embedding; training looks as an evaluation does."""
    _, path, *overrides = argv = arguments(tmp_path, hosts.output)
    cfg = load_config(path, overrides)
    split = read_split(cfg.DATASETS)
    state = {"classes": split.num_persons, "cameras": split.cameras, "config": cfg.model_dump(mode="json")}
    model = build(cfg, split.num_persons, split.num_cameras)
    weights = checkpoint.save(tmp_path, 1, {"model": model.state_dict()}, state)
    images = ["--images", str(tmp_path / "synthetic/query"), "--output", str(hosts.output / "stored")]
    for command, options in (("evaluate", []), ("embed", images)):
        hosts.start(command, [*options, *argv, f"TEST.WEIGHT={weights}"], shared=False)
        assert 0 not in hosts.finish()
        told = f"must be shared: process 1 on host {NAMES[1]} does not see"
        assert ("must be on a disk that all hosts share, and is not" if command == "embed" else told) in hosts.log(0)
