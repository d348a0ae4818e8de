"""Losses that are not finite end a training: which ones, in which step, of which images."""

import math
from collections.abc import Sequence
from pathlib import Path

from fusionreid.engine.evaluation.finite import NonFiniteError
from fusionreid.engine.training.train_step import StepReport
from fusionreid.files import write_json

SKIPPED_STEPS = 20  # in a row, by the loss scaler of fp16, end the training


def not_finite(report: StepReport, heads: Sequence[str]) -> str:
    """Name what is not finite and must end the training; empty if all is well."""
    kinds = {"identity": report.identity, "triplet": report.triplet}
    bad = [
        f"{kind} loss of head {head}"
        for kind, values in kinds.items()
        for head, value in zip(heads, values)
        if not math.isfinite(value)
    ]
    if bad:
        return f"{', '.join(bad)} is not finite"
    return f"the fp16 gradient overflowed {SKIPPED_STEPS} times in a row" if report.skipped >= SKIPPED_STEPS else ""


def refuse(what: str, epoch: int, step: int, images: Sequence[str], path: Path, *, write: bool) -> None:
    """Raise NonFiniteError for a step of an epoch; the images of its batch are named in a file, which rank 0 writes."""
    if write:
        write_json(path, {"what": what, "epoch": epoch, "step": step, "images": list(images)})
    raise NonFiniteError(
        f"epoch {epoch}, step {step}: {what}; no weight was changed by it. Its images are named in {path}; "
        "try a lower SOLVER.BASE_LR or SOLVER.PRECISION fp32"
    )
