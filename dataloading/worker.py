"""Decoding workers: forked from a server that has loaded torch and torchvision once, for all of them.

Ctrl-C and a scheduler's stop reach the whole process group. The server and its workers are deaf to both, so that the
main process can finish its step; it ends them, or they end when it dies.
"""

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext

import dataloading.decode  # noqa: F401  takes seconds, once


def fork_server() -> BaseContext:
    """Not a fork of the main process, half-alive with its CUDA and threads; nor 5 s of imports for each worker."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dataloading.worker"])
    resource_tracker.ensure_running()  # first: starting it lifts the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        forkserver.ensure_running()  # inherits the block, and passes it on: no instant in which a signal gets through
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def initialize(_worker: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """The parent is the main process, not the server; torch watches the server, which in turn outlives us."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
