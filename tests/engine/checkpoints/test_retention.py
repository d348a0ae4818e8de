"""Random runs that train, save, evaluate, are killed, fill the disk, are damaged and resume lose nothing."""

import errno
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from fusionreid.engine.checkpoints import checkpoint, retention
from fusionreid.engine.checkpoints.retention import Progress
from fusionreid.engine.checkpoints.store import CheckpointStore
from fusionreid.engine.storage import StorageError
from tests.promises import Tally

PLACES = [(os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (checkpoint, "save_file"),
          (Path, "mkdir"), (Path, "write_text"), (Path, "write_bytes"), (Path, "unlink")]  # fmt: skip
EVAL_PERIOD = 2  # steps
RUNS = 2000  # of the sweep
FAULTS = st.tuples(st.sampled_from(["kill", "full"]), st.integers(1, 24))  # which, at which call


class Killed(BaseException):
    """The process has ended: nothing of it runs any more."""


@contextmanager
def failing(fault: tuple[str, int] | None) -> Iterator[None]:
    """A file system that fails from a certain call on: for good, or until there is room again."""
    calls, (how, first) = 0, fault or ("", math.inf)

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= first and how == "kill":
                raise Killed
            if calls >= first and call is not shutil.rmtree and call is not Path.unlink:  # which need no room
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for place, name in PLACES:
            patch.setattr(place, name, wrap(getattr(place, name)))
        yield


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((8,), float(step))}}


def score(step: int) -> float:
    """Any numbers, some of them equal and some of them none; the same whenever the step is evaluated."""
    return random.Random(step).choice([math.nan, 0.1, 0.2, 0.3, 0.4, 0.5])


class AtOnce:
    """A thread that does its work at once, so that a sequence is the same whenever it is run."""

    def submit(self, work: Callable[..., Path], *given: Any) -> Future[Path]:
        future: Future[Path] = Future()
        try:
            future.set_result(work(*given))
        except StorageError as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        pass


class Run(RuleBasedStateMachine):
    """A training whose epochs have one step, each saved and every second one evaluated, as the trainer does it."""

    def __init__(self) -> None:
        super().__init__()
        shared = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None)) / "checkpoints"
        self.log: dict[int, float] = {}  # evaluations, as metrics.jsonl has them
        self.promised: set[int] = set()  # steps whose checkpoint was said to be written, and not damaged since
        self.start()

    def start(self) -> None:
        """What a process does first: nothing that was promised is missing, and what was cut short is made up."""
        self.store, self.step, due = CheckpointStore(self.root), 0, False
        self.store._thread = AtOnce()
        resumed = self.store.resume()
        if resumed is not None:
            self.step, due = resumed.state["step"], resumed.state["evaluation_due"]
            assert resumed.tensors["model"]["w"].tolist() == [self.step] * 8
        assert self.step >= max(self.promised, default=0)
        assert not list(self.root.glob(".tmp-*"))
        pending = self.store.is_pending(is_due=due)
        self.log = {step: value for step, value in self.log.items() if step <= self.step - pending}
        if pending:
            self.evaluate()

    def evaluate(self) -> None:
        value = score(self.step)
        self.log[self.step] = value
        self.finish_writing()
        self.store.evaluated(self.step, value)

    def finish_writing(self) -> None:
        path = self.store.wait()
        if path is not None:
            kept = {checkpoint.step_of(other) for other in checkpoint.checkpoints(self.root)}
            assert len(kept - {self.store.progress.best, self.store._progress_on_disk.best}) <= retention.KEEP
            self.promised = {step for step in self.promised if checkpoint.folder_of(self.root, step).exists()}
            self.promised.add(checkpoint.step_of(path))

    @rule(fault=st.none() | FAULTS)
    def train(self, fault: tuple[str, int] | None) -> None:
        try:
            with failing(fault):
                self.step += 1
                due = self.step % EVAL_PERIOD == 0
                self.finish_writing()
                self.store.save(self.step, tensors(self.step), {"evaluation_due": due})
                if due:
                    self.evaluate()
        except (Killed, StorageError):
            self.end()
            self.start()

    @rule(fault=FAULTS)
    def stop_and_save_again(self, fault: tuple[str, int]) -> None:
        """A signal: the checkpoint of this very step is written once more, over the one that may be there."""
        if not self.step:
            return
        with suppress(Killed, StorageError), failing(fault):
            self.finish_writing()
            due = self.step % EVAL_PERIOD == 0 and self.step not in self.log
            self.store.save(self.step, tensors(self.step), {"evaluation_due": due})
            self.finish_writing()
        self.end()
        self.start()

    @rule()
    def kill(self) -> None:
        self.end()
        self.start()

    @rule(data=st.data())
    def damage_the_newest(self, data: st.DataObject) -> None:
        """A bit flips while nothing runs."""
        self.end()
        whole = [path for path in checkpoint.checkpoints(self.root) if checkpoint._is_whole(path)]
        if len(whole) < 2:  # with none left a run does not start again by itself
            self.start()
            return
        path = whole[-1]
        file = data.draw(st.sampled_from(sorted(path.iterdir())))
        content = bytearray(file.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        self.promised.discard(checkpoint.step_of(path))
        self.start()

    def end(self) -> None:
        """The process is gone, and its thread with it."""
        with suppress(Killed, StorageError):
            self.store.close()

    @invariant()
    def every_evaluation_that_was_due_is_in_the_log_once(self) -> None:
        assert sorted(self.log) == list(range(EVAL_PERIOD, self.step + 1, EVAL_PERIOD))

    @invariant()
    def the_best_checkpoint_is_there_and_none_that_was_noted_is_better(self) -> None:
        progress = self.store.progress
        if progress.best >= 0:
            assert checkpoint.folder_of(self.root, progress.best).is_dir()
            assert progress.score == score(progress.best)

    def teardown(self) -> None:
        self.end()
        shutil.rmtree(self.root.parent)


def run(examples: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    limits = settings(
        max_examples=examples, stateful_step_count=20, deadline=None, database=None, suppress_health_check=checks
    )
    run_state_machine_as_test(Run, settings=limits)


def test_nothing_is_lost_in_a_hundred_random_runs() -> None:
    run(100)


@pytest.mark.sweep
@pytest.mark.promise("Random sequences of training, evaluation, kill, full disk, damage and resumption lose nothing")
def test_nothing_is_lost_in_two_thousand_random_runs(tally: Tally) -> None:
    run(RUNS)
    for number in range(RUNS):
        tally.add("survived", f"run {number}")


def test_the_best_is_the_highest_finite_score_that_has_a_checkpoint() -> None:
    progress = Progress()
    for step, value, is_saved, best in (
        (1, math.nan, True, -1),  # never the best
        (2, 0.3, True, 2),
        (3, 0.3, True, 2),  # the first of equals
        (4, 0.9, False, 2),
        (5, math.nan, True, 2),
        (6, 0.4, True, 6),
    ):
        progress = retention.after_evaluation(progress, step, value, is_saved=is_saved)
        assert (progress.evaluated, progress.best) == (step, best)
    nan = Progress(evaluated=7, best=7, score=math.nan)  # as an earlier version could write
    assert retention.after_evaluation(nan, 8, 0.1, is_saved=True) == Progress(8, 8, 0.1)


def test_what_goes_and_what_stays() -> None:
    assert retention.to_remove([1, 2, 3, 4], newest=4, spared=[1]) == [2]
    assert retention.to_remove([1, 2, 3, 9], newest=3, spared=[]) == [1, 9], "a damaged one of a later step was passed"
    assert retention.to_remove([3], newest=3, spared=[-1]) == []
