"""Decisions about the checkpoints of a run, by step number alone: which to keep, which is best, what is still to do.

Pure functions: no clock, no file. `store.py` carries the decisions out.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

KEEP = 2  # newest checkpoints that stay, beside the best one


class Progress(NamedTuple):
    """What the evaluations of a run have found so far; a step of -1 means none."""

    evaluated: int = -1  # step of the newest finished evaluation
    best: int = -1  # step of the checkpoint with the highest score
    score: float = math.nan  # its score


def after_evaluation(progress: Progress, step: int, score: float, *, is_saved: bool) -> Progress:
    """Progress once this step has been evaluated; it becomes the best if its checkpoint is there and none is as good.

    A score that is not a number is never the best and gives way to any other.
    """
    is_better = math.isnan(progress.score) or score > progress.score
    if is_saved and is_better and not math.isnan(score):
        return Progress(step, step, score)
    return progress._replace(evaluated=step)


def after_resume(progress: Progress, step: int, steps: Collection[int]) -> Progress:
    """Progress of a run that goes on from this step: what came later is redone; `steps` are those on disk."""
    if progress.best > step or progress.best not in steps:
        progress = progress._replace(best=-1, score=math.nan)
    return progress._replace(evaluated=min(progress.evaluated, step))


def is_pending(progress: Progress, step: int, *, is_due: bool) -> bool:
    """Whether the evaluation that was due at the checkpoint of this step was never finished."""
    return is_due and progress.evaluated < step


def to_remove(steps: Collection[int], newest: int, spared: Collection[int], keep: int = KEEP) -> list[int]:
    """Steps whose checkpoints go once that of the step `newest` is whole.

    Later ones are damaged and were passed over, or this run would have gone on from them.
    """
    kept = {*sorted(step for step in steps if step <= newest)[-keep:], *spared}
    return [step for step in sorted(steps) if step not in kept]
