"""Agreement: one process decides for all, and all see the same folder."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from fusionreid.engine.distributed import peers
from fusionreid.engine.distributed.parallel import Ranks, all_reduce_max
from fusionreid.engine.storage import OutputFolderError
from fusionreid.errors import ReIDError

T = TypeVar("T")
PATIENCE_S = 10.0  # for a network file system to show a new file to another host


def decide(work: Callable[[], T], ranks: Ranks) -> T:
    """Do the work on rank 0 and return its result on every rank, or raise its error on every rank."""
    outcome: list[T | ReIDError | None] = [None]
    if ranks.main:
        try:
            outcome = [work()]
        except ReIDError as error:
            outcome = [error]
    peers.meet()  # however long the work takes
    if ranks.world_size > 1:
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], ReIDError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def first_of_ranks(texts: Sequence[str], ranks: Ranks) -> str:
    """Return the first text of the first rank that has one, and whose it is, on every rank; empty if none has."""
    if ranks.world_size > 1:
        of_all: list[Sequence[str]] = [()] * ranks.world_size
        dist.all_gather_object(of_all, texts[:1])
        texts = [f"{text}, on process {rank}" for rank, some in enumerate(of_all) for text in some]
    return next(iter(texts), "")


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise OutputFolderError on every rank unless all of them see what rank 0 writes into the folder."""
    if ranks.world_size == 1:
        return
    token = [f".shared-{os.urandom(8).hex()}"]
    if ranks.main:
        (folder / token[0]).touch()
    dist.broadcast_object_list(token)
    deadline = time.monotonic() + PATIENCE_S
    while not (is_seen := (folder / token[0]).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = int(all_reduce_max(torch.tensor(-1 if is_seen else ranks.rank)))
    if ranks.main:
        (folder / token[0]).unlink(missing_ok=True)
    if blind >= 0:
        host = [socket.gethostname()]
        dist.broadcast_object_list(host, src=blind)
        raise OutputFolderError(
            f"OUTPUT_DIR {folder} must be shared: process {blind} on host {host[0]} does not see what process 0 writes "
            "there; set it to a folder on a file system that all hosts mount"
        )
