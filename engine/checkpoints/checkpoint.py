"""Checkpoint folders: written whole or not at all, verified when read, found again by step number."""

import errno
import json
import logging
import math
import os
import platform
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusionreid.engine.checkpoints.retention import KEEP, Progress, to_remove
from fusionreid.engine.storage import StorageError
from fusionreid.sealed import entries, seal, unseal, write_sealed
from fusionreid.weights.checkpoint_files import (
    FORMAT,
    MANIFEST,
    STATE,
    TENSORS,
    CheckpointError,
    DamagedError,
    verify,
)

__all__ = ["STATE", "CheckpointError", "DamagedError", "verify"]

BEST = "best.json"
LAST_STEP = 10**12  # no training has so many
ASIDE, DRAFT, REMOVED = ".tmp-old-", ".tmp-", ".tmp-removed-"  # before the name of a checkpoint

log = logging.getLogger(__name__)


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Step number of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def save(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write `root/step-<step>` whole or not at all; a checkpoint of the same step is replaced.

    Each part of `tensors` becomes a file. Step, format and versions are added to `state`, which must fit into JSON.
    """
    final = folder_of(root, step)
    draft, aside = (final.with_name(f"{prefix}{final.name}") for prefix in (DRAFT, ASIDE))
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    text = json.dumps({**state, "format": FORMAT, "step": step, "versions": versions}, indent=2)
    needed = sum(t.nbytes for part in tensors.values() for t in part.values()) + len(text)
    with _storing(final, needed):
        root.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(root).free < 1.2 * needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir()
            for name, part in tensors.items():
                save_file(_separate(part), draft / f"{name}{TENSORS}", metadata={"format": "pt"})
            (draft / STATE).write_text(text, encoding="utf-8")
            (draft / MANIFEST).write_bytes(seal({"format": FORMAT, "files": entries(draft.iterdir())}))
            for path in (*draft.iterdir(), draft):
                _sync(path)
            _replace(final, draft, aside)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return final


def _separate(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each with memory of its own: a file of safetensors takes no other."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in part.items():
        place = tensor.untyped_storage().data_ptr()
        own = tensor.is_contiguous() and place not in seen and tensor.nbytes == tensor.untyped_storage().nbytes()
        separate[name] = tensor.detach() if own else tensor.detach().clone(memory_format=torch.contiguous_format)
        seen.add(place)
    return separate


def _replace(final: Path, draft: Path, aside: Path) -> None:
    """Put the draft in the place of `final`. A kill in between leaves one of them whole, which `clean` gives back."""
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.rename(final, aside)
    try:
        os.rename(draft, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by part, state) of a verified checkpoint; the tensors are in memory of their own."""
    names = verify(path)
    try:
        state = json.loads((path / STATE).read_bytes())
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} is not a JSON object")
        parts = [name.removesuffix(TENSORS) for name in names if name.endswith(TENSORS)]
        files = {part: load_file(path / f"{part}{TENSORS}") for part in parts}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a checkpoint although its digests match: {error}") from error
    return {part: {key: tensor.clone() for key, tensor in tensors.items()} for part, tensors in files.items()}, state


def checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders, whole or damaged, by step number: the clock plays no part."""
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-[0-9]{8,}", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def latest(root: Path) -> Path | None:
    """The whole checkpoint with the highest step, or None if there is none at all; damaged ones are passed over."""
    candidates = checkpoints(root)
    for path in reversed(candidates):
        try:
            verify(path)
            return path
        except DamagedError as error:
            log.warning("checkpoint passed over: %s", error)
    if candidates:
        raise CheckpointError(f"every checkpoint in {root} is damaged: remove the folder to start from the beginning")
    return None


class _Evaluations(BaseModel, strict=True, allow_inf_nan=False):
    """The content of best.json."""

    step: Annotated[int, Field(ge=-1, lt=LAST_STEP)]
    score: float | None
    evaluated: Annotated[int, Field(ge=-1, lt=LAST_STEP)]


def write_progress(root: Path, progress: Progress) -> None:
    """Replace best.json, which ends with a digest of itself."""
    with _storing(root / BEST):
        score = None if math.isnan(progress.score) else progress.score
        values = {"step": progress.best, "score": score, "evaluated": progress.evaluated}
        root.mkdir(parents=True, exist_ok=True)
        write_sealed(root / BEST, values)


def read_progress(root: Path) -> Progress:
    """Read best.json, which is there once a checkpoint was evaluated; CheckpointError if a byte of it has changed."""
    if not (root / BEST).exists():
        return Progress()
    try:
        found = _Evaluations.model_validate(unseal(root / BEST))
        return Progress(found.evaluated, found.step, math.nan if found.score is None else found.score)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{root / BEST} is damaged ({error}): remove it, and the next evaluation chooses a new best checkpoint; "
            "until then only the newest checkpoints are kept"
        ) from error


class Best(NamedTuple):
    """The checkpoint to keep whatever comes, and its score."""

    path: Path
    score: float


def best(root: Path) -> Best | None:
    """The checkpoint with the highest score, if any was evaluated; it may be damaged."""
    progress = read_progress(root)
    return Best(folder_of(root, progress.best), progress.score) if progress.best >= 0 else None


def purge(root: Path, newest: int, spared: Collection[int] = (), keep: int = KEEP) -> None:
    """Remove all checkpoints but the last `keep` up to the step `newest`, and those that are spared."""
    with _storing(root):
        steps = [step_of(path) for path in checkpoints(root)]
        for step in to_remove(steps, newest, spared, keep):
            path = folder_of(root, step)
            doomed = path.with_name(f"{REMOVED}{path.name}")  # a kill in between leaves no half of it under its name
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def clean(root: Path) -> None:
    """Remove what a killed run left half done, and give back what it left whole. For the holder of the lock only."""
    for leftover in sorted(root.glob(f"{DRAFT}*")):
        name = leftover.name.removeprefix(ASIDE).removeprefix(DRAFT)
        final = root / name
        if re.fullmatch(r"step-[0-9]{8,}", name) and _is_whole(leftover) and not _is_whole(final):
            shutil.rmtree(final, ignore_errors=True)
            os.rename(leftover, final)
            log.warning("gave back %s, which an earlier run was replacing", final)
        else:
            log.warning("removed %s, left half done by an earlier run", leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    with suppress(CheckpointError):
        return bool(verify(path))
    return False


@contextmanager
def _storing(path: Path, needed: int = 0) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        try:
            free = f"{shutil.disk_usage(path.parent).free / 2**20:.1f} MiB"
        except OSError:
            free = "an unknown amount"
        raise StorageError(
            f"{path} was not written: {error}; {needed / 2**20:.1f} MiB needed, {free} free: make room or set another "
            f"OUTPUT_DIR"
        ) from error


def _sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk and not only into its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
