"""Which checkpoint a path means, as people name one: a run, its checkpoints, one of them, or the model file in it."""

from pathlib import Path

from fusionreid.engine.checkpoints import checkpoint
from fusionreid.errors import ReIDError

MODEL = "model.safetensors"


class NoCheckpointError(ReIDError, ValueError):
    """A path that names no checkpoint."""


def checkpoint_at(path: Path, output: Path) -> Path:
    """The folder of a checkpoint, or a file of the published code; of a run or its `checkpoints`, the newest one.

    NoCheckpointError names the newest checkpoint in `output`, OUTPUT_DIR.
    """
    if path.name == MODEL and _is_checkpoint(path.parent):
        return path.parent
    if path.is_file() or _is_checkpoint(path):
        return path
    for folder in (path, path / "checkpoints"):
        if checkpoint.checkpoints(folder):
            newest = checkpoint.latest(folder)
            assert newest is not None  # else it has raised
            return newest
    what = "holds no checkpoint" if path.exists() else "is not there"
    others = checkpoint.checkpoints(output / "checkpoints")
    remedy = f"the newest checkpoint in OUTPUT_DIR is {others[-1]}, taken where TEST.WEIGHT is empty" if others else (
        f"name a checkpoint folder or a .pth file; there is no checkpoint in OUTPUT_DIR {output} either"
    )  # fmt: skip
    raise NoCheckpointError(f"TEST.WEIGHT {path} {what}: {remedy}")


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, whole or damaged."""
    named = folder.name.startswith("step-")  # a run has a manifest.json too
    return folder.is_dir() and (named or any((folder / name).exists() for name in (checkpoint.STATE, MODEL)))
