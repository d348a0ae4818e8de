"""The files of a checkpoint folder, and their verification: nothing in it is believed without its digest.

`step-00000123/` holds <part>.safetensors (model, optimizer, ...), state.json, and manifest.json with a digest of each.
Reading one runs no code, so a checkpoint may come from anyone. Importing this does not import torch.
"""

import re
from pathlib import Path

from fusionreid.errors import ReIDError
from fusionreid.sealed import entries, unseal

FORMAT = 1
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", ".safetensors"
CHECKPOINT = re.compile("step-[0-9]{8,}")  # name of a folder


class CheckpointError(ReIDError, RuntimeError):
    """A checkpoint that does not fit, is of another format, or is damaged."""

    exit_code = 3


class DamagedError(CheckpointError):
    """Bytes are missing or are not those that were written."""


def verify_around(file: Path) -> None:
    """Verify the checkpoint that a file of tensors is part of, if it is part of one, whatever of it is left."""
    folder = file.resolve().parent
    if file.suffix == TENSORS and ((folder / STATE).exists() or CHECKPOINT.fullmatch(folder.name)):
        verify(folder)


def verify(path: Path) -> list[str]:
    """Return the files of a checkpoint; CheckpointError unless each has the size and digest that the manifest gives."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}")
    try:
        manifest = unseal(path / MANIFEST)
        if manifest["format"] != FORMAT:
            version = manifest["format"]
            raise CheckpointError(
                f"{path} has checkpoint format {version}, this is {FORMAT}: use the version it is from"
            )
        files = manifest["files"]
        if STATE not in files:
            raise ValueError(f"it does not list {STATE}")
        found = entries(path / name for name in files)  # by file name: one with a folder in it is not found
        for name in files:
            if found[name] != files[name]:
                raise DamagedError(f"{path / name} is damaged: use another checkpoint")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path / MANIFEST} is not valid ({error}): use another checkpoint") from error
    return list(files)
