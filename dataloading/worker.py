"""Decoding workers: forked from a server that has loaded torch and torchvision once, for all of them.

Ctrl-C and a scheduler's stop reach the whole process group. The server and its workers ignore both, so that the main
process can finish its step; it ends them, or they end when it dies.
"""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.context import BaseContext


def fork_server() -> BaseContext:
    """Not a fork of the main process, half-alive with its CUDA and threads; nor 5 s of imports for each worker."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dataloading.worker"])
    return context


def initialize(_worker: int) -> None:
    _ignore_signals()  # again: torch has just set its own handlers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _ignore_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_parent() -> None:
    """The parent is the main process, not the server; torch watches the server, which in turn outlives us."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


if any("multiprocessing.forkserver" in word for word in sys.orig_argv):  # we are the server
    _ignore_signals()

import dataloading.decode  # noqa: E402, F401  takes seconds, so the signals come first
