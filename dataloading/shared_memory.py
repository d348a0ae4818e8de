"""Shared memory that decode workers pass their batches on through. Importing this does not import torch."""

import shutil
from pathlib import Path

from fusionreid.errors import ReIDError

SHARED = Path("/dev/shm")
BATCHES_AHEAD = 2  # decoded in advance: by each worker process, or by DALI


class NoRoomForBatchesError(ReIDError, ValueError):
    """Shared memory has no room for the batches that decode workers pass on through it."""

    exit_code = 6


def most_workers(wanted: int, batch_bytes: int) -> int:
    """Return how many of the wanted decode workers shared memory has room for."""
    if not SHARED.is_dir():
        return wanted
    return min(wanted, shutil.disk_usage(SHARED).free // (BATCHES_AHEAD * batch_bytes))


def check_shared_memory(num_workers: int, batch_bytes: int, num_batches: int | None = None) -> str:
    """Say what the workers need and what there is. NoRoomForBatchesError: with too little they would die or hang."""
    ahead = num_workers * BATCHES_AHEAD
    needed = batch_bytes * (ahead if num_batches is None else min(ahead, num_batches))
    if not needed or not SHARED.is_dir():
        return "decoding needs no shared memory"
    free = shutil.disk_usage(SHARED).free
    text = f"{free * 1e-9:.2f} GB free in {SHARED}, {num_workers} decode workers need {needed * 1e-9:.2f} GB"
    if free < needed:
        raise NoRoomForBatchesError(f"{text}: enlarge it (docker run --shm-size), or set DATALOADER.NUM_WORKERS lower")
    return text
