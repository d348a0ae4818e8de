"""Kill -9 at every step, at any moment, on any number of processes: a run that goes on ends as if nothing had been."""

import json
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.promises import Tally
from tests.runs import arguments
from tests.sweep.world import weights
from tests.sweep.zygote import Zygote

pytestmark = pytest.mark.sweep
STEPS, POINTS, CROSSINGS = 30, 100, 30
EPOCHS = 9  # of three or four steps
LIMIT_S = 120


class Processes:
    """The processes of a run, forked from ones that have imported everything."""

    def __init__(self, count: int) -> None:
        self.zygotes = [Zygote(rank, count) for rank in range(count)]

    def start(self, data: Path, output: Path) -> None:
        """Start to train, or go on."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if len(self.zygotes) > 1 else {}
        argv = arguments(data, output, SOLVER__MAX_EPOCHS=EPOCHS, PARALLEL__EXACT="yes")
        for rank, zygote in enumerate(self.zygotes):
            zygote.start(["train", *argv], output.parent / f"said-{rank}.txt", place)

    def kill(self) -> None:
        """End all at once, as a machine does that loses its power."""
        for zygote in self.zygotes:
            zygote.kill()

    def wait(self) -> list[int]:
        return [zygote.wait() for zygote in self.zygotes]

    def is_alive(self) -> bool:
        """Whether the first process still runs."""
        state = Path(f"/proc/{self.zygotes[0].child}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"

    def finish(self, data: Path, output: Path) -> None:
        self.start(data, output)
        assert set(self.wait()) == {0}, said(output)

    def close(self) -> None:
        for zygote in self.zygotes:
            zygote.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[Callable[[int], Processes]]:
    started: dict[int, Processes] = {}

    def of(count: int) -> Processes:
        if count not in started:
            started[count] = Processes(count)
        return started[count]

    yield of
    for group in started.values():
        group.close()


@pytest.fixture(scope="module")
def unbroken(processes: Callable[[int], Processes], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a run on so many processes that nobody disturbs; its data are beside it."""
    root = tmp_path_factory.mktemp("unbroken")

    def of(count: int) -> Path:
        output = root / str(count) / "run"
        if not output.exists():
            output.parent.mkdir()
            processes(count).finish(root / "data", output)
        return output

    return of


def said(output: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(output.parent.glob("said-*.txt")))


def steps(output: Path) -> list[int]:
    """Steps in the log, as far as it is written."""
    lines = output / "metrics.jsonl"
    whole = [line for line in lines.read_text().splitlines() if line.endswith("}")] if lines.exists() else []
    return [found["step"] for line in whole if "loss" in (found := json.loads(line))]


def await_step(run: Processes, output: Path, step: int) -> None:
    """Wait until the run has logged a step, or has ended."""
    limit = time.monotonic() + LIMIT_S
    while run.is_alive() and step not in steps(output)[-1:] and time.monotonic() < limit:
        time.sleep(0.002)


@pytest.mark.promise("Killed at each of 30 consecutive steps, a run goes on and ends in the same bits")
@pytest.mark.parametrize("count", [1, 2])
def test_kills_at_consecutive_steps(
    processes: Callable[[int], Processes], unbroken: Callable[[int], Path], tmp_path: Path, tally: Tally, count: int
) -> None:
    run, output, data = processes(count), tmp_path / "run", unbroken(count).parents[1] / "data"
    for step in range(1, STEPS + 1):
        run.start(data, output)
        await_step(run, output, step)
        run.kill()
        ended = run.wait()
        tally.add("survived" if ended == [-signal.SIGKILL] * count else "lost", f"step {step}: {ended} {said(output)}")
    run.finish(data, output)
    assert weights(str(output)) == weights(str(unbroken(count)))


@pytest.mark.promise("Killed at any of 100 random moments, a run goes on and ends in the same bits")
@pytest.mark.parametrize("count", [1, 2])
def test_kills_at_random_moments(
    processes: Callable[[int], Processes], unbroken: Callable[[int], Path], tmp_path: Path, tally: Tally, count: int
) -> None:
    run, data, draw = processes(count), unbroken(count).parents[1] / "data", random.Random(count)
    expected, number = weights(str(unbroken(count))), 0
    while tally.kinds.total() < POINTS:
        number += 1
        output, kills = tmp_path / str(number) / "run", 0
        output.parent.mkdir()
        while not (output / "exit.json").exists():
            run.start(data, output)
            time.sleep(draw.uniform(0.0, 1.0 + count))
            run.kill()
            ended = run.wait()
            kills += any(ended)
            assert set(ended) <= {0, -signal.SIGKILL}, said(output)
        run.finish(data, output)
        for _ in range(min(kills, POINTS - tally.kinds.total())):
            tally.add("survived" if weights(str(output)) == expected else "silent", f"run {number}: {said(output)}")


@pytest.mark.promise("Killed and continued on 1, 2 or 4 processes in turn, a run loses and repeats no step")
def test_kills_across_numbers_of_processes(
    processes: Callable[[int], Processes], unbroken: Callable[[int], Path], tmp_path: Path, tally: Tally
) -> None:
    data, draw = unbroken(1).parents[1] / "data", random.Random(4)
    number, before = 0, 0
    while tally.kinds.total() < CROSSINGS:
        number += 1
        output = tmp_path / str(number) / "run"
        output.parent.mkdir()
        kills = 0
        while not (output / "exit.json").exists():
            before = count = draw.choice([n for n in (1, 2, 4) if n != before])
            run = processes(count)
            run.start(data, output)
            time.sleep(draw.uniform(0.5, 3.0))
            run.kill()
            ended = run.wait()
            assert set(ended) <= {0, -signal.SIGKILL}, said(output)
            kills += any(ended)
            tally.add("survived", f"on {count}: {said(output)}")
        run.finish(data, output)
        losses, expected = (
            [line for line in weights(str(path))[2] if "loss" in line] for path in (output, unbroken(1))
        )
        assert [line["step"] for line in losses] == [line["step"] for line in expected]
        assert [line["loss"] for line in losses] == pytest.approx([line["loss"] for line in expected], rel=1e-3)
