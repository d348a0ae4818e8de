"""Losses that are not finite end a training: which ones, in which step, of which images, and where they began."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fusionreid.engine.distributed.agreement import first_of_ranks
from fusionreid.engine.distributed.parallel import Ranks
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


def refuse(
    what: str, epoch: int, step: int, modules: Sequence[str], images: Sequence[str], folder: Path, ranks: Ranks
) -> None:
    """Raise NonFiniteError for a step of an epoch, with the first of the modules that this or another rank found.

    Rank 0 names the images of the batch in `folder`/non_finite.json.
    """
    path, origin = folder / "non_finite.json", first_of_ranks(modules, ranks)
    if ranks.main:
        write_json(path, {"what": what, "epoch": epoch, "step": step, "began_in": origin, "images": list(images)})
    began = f" It began in {origin}." if origin else ""
    raise NonFiniteError(
        f"epoch {epoch}, step {step}: {what}; no weight was changed by it.{began} Its images are named in {path}; "
        "try a lower SOLVER.BASE_LR or SOLVER.PRECISION fp32"
    )


@contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """Context manager: modules whose output is not finite are named in the list, in the order they end.

    Compiled parts are computed uncompiled, since a graph passes over its modules' hooks.
    """
    names, found = {module: name or "the model" for name, module in model.named_modules()}, list[str]()

    def look(module: nn.Module, inputs: object, output: object) -> None:
        bad, size = (sum(counts) for counts in zip((0, 0), *_count(output)))
        if bad and module in names:
            kind, why = type(module).__name__, _why(module, inputs)
            found.append(f"{names[module]} ({kind}), {why}: {bad:,} of {size:,} values")

    hook = register_module_forward_hook(look)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield found
    finally:
        hook.remove()


def _count(values: object) -> Iterator[tuple[int, int]]:
    """How many numbers are not finite and how many there are, of every tensor in nested tuples."""
    if isinstance(values, Tensor) and values.is_floating_point():
        yield int((~values.isfinite()).sum()), values.numel()
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _count(value)


def _why(module: nn.Module, inputs: object) -> str:
    if any(bad for bad, _ in _count(inputs)):
        return "by its input"
    if any(bad for bad, _ in _count(tuple(module.parameters()))):
        return "by its weights"
    return "from finite inputs and weights"
