"""Decode workers: forked from a server that has loaded torch and torchvision once, for all of them.

Ctrl-C and a scheduler's stop reach the whole process group. The server and its workers block them, so that the
main process can finish its step; it ends them, or they end when it dies.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from fusionreid.dataloading.decode import Filter, decode_batch  # takes seconds to import, once
from fusionreid.dataloading.records import DataError
from fusionreid.dataloading.shared_memory import BATCHES_AHEAD, check_shared_memory


class _Files(Dataset[Tensor]):
    """Files as a worker sees them. A bad file comes back as a value: raised there, it would arrive with a traceback."""

    def __init__(self, paths: Sequence[str], size: tuple[int, int], resize: Filter) -> None:
        self.paths, self.size, self.resize = paths, size, resize

    def __getitems__(self, rows: Sequence[int]) -> Tensor | DataError:
        try:
            return decode_batch([self.paths[row] for row in rows], self.size, self.resize)
        except DataError as error:
            return error


class DecodeWorkers:
    """Image source whose worker processes decode the files; the same workers serve every call until `close`.

    Shared memory in use: at most BATCHES_AHEAD batches per worker, 12.6 MB per batch of 128 at 256 x 128.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: tuple[int, int],
        resize: Filter,
        num_workers: int,
        *,
        fallback: Callable[[Sequence[int]], Tensor],
        pin: bool = False,
    ) -> None:
        """Start no process yet; `fallback` decodes, in the main process, a batch with a file that cannot be read."""
        self._fallback, self._size = fallback, size
        self._batches: list[np.ndarray] = []  # read by the DataLoader whenever it is iterated anew
        self._loader = DataLoader(
            _Files(paths, size, resize),
            batch_sampler=self._batches,
            num_workers=num_workers,
            collate_fn=default_convert,
            pin_memory=pin,
            persistent_workers=num_workers > 0,
            prefetch_factor=BATCHES_AHEAD if num_workers else None,
            multiprocessing_context=fork_server() if num_workers else None,
            worker_init_fn=_initialize,
            generator=torch.Generator(),  # the default one belongs to the model: a resume must find it untouched
        )
        self._end: weakref.finalize | None = None
        self._closed = False

    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, None]]:
        """Yield (B, H, W, 3) uint8 per batch of positions in `paths`; the next call ends this one."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        self._batches[:] = batches
        if self._end is None and batches:
            height, width = self._size
            largest = 3 * height * width * max(map(len, batches))
            check_shared_memory(self._loader.num_workers, largest, len(batches))
        with _pipes():
            pixels: Any = iter(self._loader)
        if self._end is None and self._loader.num_workers:
            # For when this is dropped, and for the exit, which else would send SIGTERM and wait for ever.
            self._end = weakref.finalize(self, pixels._shutdown_workers)
            atexit.register(self._end)
        for batch in batches:
            with _pipes():
                decoded = next(pixels)
            yield self._fallback(batch.tolist()) if isinstance(decoded, DataError) else decoded, None

    def close(self) -> None:
        """End the workers; a later call raises RuntimeError."""
        self._closed = True
        if self._end is not None:
            self._end()


@contextmanager
def _pipes() -> Iterator[None]:
    """Turn a broken worker pipe into a RuntimeError."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise RuntimeError("a decode worker has ended: it was killed, or memory ran out") from error


def fork_server() -> BaseContext:
    """Start the server that forks workers: a fork of the main process would inherit half-alive CUDA and threads.

    It imports torch and torchvision once, 5 s that each worker would spend again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fusionreid.dataloading.decode_workers"])
    resource_tracker.ensure_running()  # first: starting it lifts the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
    try:
        forkserver.ensure_running()  # inherits the block, and passes it on: no instant in which a signal gets through
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _initialize(_worker: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the main process ends; torch only watches the server, which may outlive it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
