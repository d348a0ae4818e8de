"""The checkpoints of one run, written by a thread while training continues, and found again.

The decisions are those of `retention.py`, the files those of `checkpoint.py`.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fusionreid.engine.checkpoints import checkpoint, retention
from fusionreid.engine.checkpoints.retention import Progress
from fusionreid.engine.storage import StorageError

FAILED_SAVES = 3  # in a row end the run

log = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """The checkpoint that a run goes on from."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]  # by part
    state: dict[str, Any]


class CheckpointStore:
    """Write, keep and find the checkpoints in a folder, for the one process that holds the run's lock.

    At most one checkpoint is being written: a second one waits for the first.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.progress = root, Progress()
        self._progress_on_disk = Progress()
        self.saved_step = -1  # of the newest whole checkpoint
        self._failed_saves = 0  # in a row
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self._step = -1  # being written

    def resume(self) -> Resumed | None:
        """Put the folder in order and load the newest whole checkpoint, if there is one."""
        checkpoint.clean(self.root)
        self._progress_on_disk = checkpoint.read_progress(self.root)  # if damaged, that is told now
        path = checkpoint.latest(self.root)
        if path is None:
            return None
        self.saved_step = checkpoint.step_of(path)
        steps = [checkpoint.step_of(other) for other in checkpoint.checkpoints(self.root)]
        self.progress = retention.after_resume(self._progress_on_disk, self.saved_step, steps)
        if self.progress != self._progress_on_disk:  # else a later kill would believe evaluations that are redone now
            checkpoint.write_progress(self.root, self.progress)
            self._progress_on_disk = self.progress
        return Resumed(path, *checkpoint.load(path))

    def is_pending(self, *, is_due: bool) -> bool:
        """Whether the evaluation that was due at the step resumed from is still to be made."""
        return retention.is_pending(self.progress, self.saved_step, is_due=is_due)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint, after the one before; nobody may change the tensors until it is written."""
        self.wait()
        self._step = step
        self._writing = self._thread.submit(checkpoint.save, self.root, step, tensors, state)

    def is_written(self) -> bool:
        """Whether a checkpoint has been written, or has failed to be, since the last `wait`."""
        return self._writing is not None and self._writing.done()

    def wait(self, *, last: bool = False) -> Path | None:
        """Wait for the checkpoint being written and return where it is, or None.

        A disk that is full costs that checkpoint alone, unless it was the `last`, there is no other, or it happened
        `FAILED_SAVES` times in a row: then StorageError.
        """
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        try:
            path = writing.result()
            self.saved_step = self._step
            checkpoint.purge(self.root, self._step, (self.progress.best, self._progress_on_disk.best))
            self._failed_saves = 0
            return path
        except StorageError as error:
            self._failed_saves += 1
            if last or self._failed_saves >= FAILED_SAVES or not checkpoint.checkpoints(self.root):
                raise
            log.warning("%s; training continues from memory", error)
            return None

    def evaluated(self, step: int, score: float) -> None:
        """Note the score of a step, and whether its checkpoint, which was waited for, is now the best."""
        self.progress = retention.after_evaluation(self.progress, step, score, is_saved=self.saved_step == step)
        try:
            checkpoint.write_progress(self.root, self.progress)
            self._progress_on_disk = self.progress
        except StorageError as error:
            log.warning("%s; training continues", error)

    def close(self) -> None:
        """Wait for the checkpoint being written; StorageError if it is lost."""
        try:
            self.wait(last=True)
        finally:
            self._thread.shutdown()
