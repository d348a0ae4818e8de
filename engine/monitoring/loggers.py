"""Loggers that draw curves, behind one protocol: TensorBoard, and wandb or trackio if SOLVER.LOGGERS names them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fusionreid.errors import ReIDError

PROJECT = "fusionreid"  # name under which wandb and trackio list the runs


class Logger(Protocol):
    """Receives the numbers of a log line."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""

    def close(self) -> None:
        """Write what is still buffered."""


class MissingLoggerError(ReIDError, ValueError):
    """SOLVER.LOGGERS names a package that is not installed."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise unless every package is installed; nothing is imported."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as wandb leaves, is no package
            raise MissingLoggerError(
                f"SOLVER.LOGGERS names {name}, which is not installed: pip install {name}, or remove it from the key"
            )


def logger_factories(
    names: Sequence[str], output: Path, step: int, run: str, settings: Mapping[str, Any]
) -> dict[str, Callable[[], Logger]]:
    """Functions that open each logger, for a run that goes on after `step`; a resumed run keeps its name `run`."""
    own = {"tensorboard": partial(TensorBoard, output, step)}
    return {name: own.get(name) or partial(Tracker, name, output, run, settings) for name in names}


class TensorBoard:
    """Event files in OUTPUT_DIR/tensorboard."""

    def __init__(self, output: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step as points of curves."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class Tracker:
    """wandb, or trackio, which has the same functions; a resumed run continues its own curves."""

    def __init__(self, name: str, output: Path, run: str, settings: Mapping[str, Any]) -> None:
        self._module = import_module(name)
        own = {"id": run, "dir": str(output)} if name == "wandb" else {}  # trackio identifies a run by its name
        title = f"{output.absolute().name}-{run}"
        self._module.init(project=PROJECT, name=title, config=dict(settings), resume="allow", **own)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        """End the run of the tracker."""
        self._module.finish()
