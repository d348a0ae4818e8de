"""A process that has imported everything, and forks one that runs a command whenever it is told to on standard input.

A command is then killed within milliseconds of its first line of work, and started again as quickly.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests import ROOT


class Zygote:
    """The parent's end: the commands of one rank, one after the other."""

    def __init__(self, rank: int, world_size: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment |= {key: str(value) for key, value in place.items()} if world_size > 1 else {}
        self._process = subprocess.Popen([sys.executable, "-m", "tests.sweep.zygote"], env=environment, cwd=ROOT,
                                         text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        self.child = 0

    def start(self, argv: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Fork a process that runs the command; what it says is added to a file."""
        order = {"argv": list(argv), "log": str(log), "environment": dict(environment)}
        print(json.dumps(order), file=self._stream(self._process.stdin), flush=True)
        self.child = int(self._stream(self._process.stdout).readline())

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the command; it is no error if that has ended, as the zygote alone collects it."""
        os.kill(self.child, number)

    def wait(self) -> int:
        """Exit code of the command, negative for a signal."""
        self.collect()
        return int(self._stream(self._process.stdout).readline())

    def collect(self) -> None:
        """Let the zygote collect its child, whose number is free from then on."""
        print("", file=self._stream(self._process.stdin), flush=True)

    def close(self) -> None:
        """End the zygote."""
        self._stream(self._process.stdin).close()
        self._process.wait(60)

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream


def main() -> None:
    """The zygote's end."""
    import tensorboard.compat.proto  # noqa: F401
    import torch
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import fusionreid.engine.evaluation.evaluator
    import fusionreid.engine.training.trainer  # noqa: F401
    from fusionreid.engine import cli

    torch.set_num_threads(1)
    while order := sys.stdin.readline():
        told = json.loads(order)
        child = os.fork()
        if not child:
            os.environ |= told["environment"]
            log = os.open(told["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os._exit(cli.main(told["argv"]))
        print(child, flush=True)
        sys.stdin.readline()  # until then its number is not given to another process
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
