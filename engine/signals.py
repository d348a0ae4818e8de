"""Signals that ask a command to stop: SIGINT, SIGTERM, and SIGUSR1, which SLURM sends before it takes a node away.

They are read by a thread of their own. Python's handlers run in the main thread between two bytecodes, and that thread
may be inside a collective whose peer is gone, or a read that never returns: it would be deaf.
"""

import os
import signal
import threading
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Self

NUMBERS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
REASONS = {128 + number: f"stopped by {number.name}" for number in NUMBERS}  # by exit code
REPEAT_S = 1.0  # a launcher passes on the terminal's signal: within this time it is one and the same


class Signals:
    """Context manager that calls `handle(number)` for each signal, within milliseconds; the main thread must enter it.

    It may be nested: inside, the inner one has the signals.
    """

    def __init__(self, handle: Callable[[int], None]) -> None:
        self._handle = handle

    def __enter__(self) -> Self:
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._outer_end = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._outer = {number: signal.signal(number, _nothing) for number in NUMBERS}
        self._thread = threading.Thread(target=self._listen, args=(read_end,), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._outer.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._outer_end, warn_on_full_buffer=False)
        os.close(self._write_end)
        self._thread.join()

    def _listen(self, read_end: int) -> None:
        with open(read_end, "rb", buffering=0) as pipe:
            while numbers := pipe.read(1):
                if numbers[0] in NUMBERS:
                    self._handle(numbers[0])


class Stop(Signals):
    """Remember the first request to stop; a second one ends the process at once."""

    def __init__(self) -> None:
        super().__init__(self._request)
        self.requested: int | None = None
        self._since = 0.0

    @property
    def flag(self) -> int:
        """Number of the signal, or 0: the largest over all ranks is the wish of any."""
        return self.requested or 0

    def _request(self, number: int) -> None:
        if self.requested is None:
            self.requested, self._since = number, monotonic()
        elif monotonic() - self._since > REPEAT_S:
            os._exit(128 + number)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Handle a signal in Python, so that its number is written to the pipe and its default action is not taken."""


def _forget() -> None:
    """In a forked child: the pipe is its parent's, who would take the child's signals for its own."""
    if signal.getsignal(signal.SIGTERM) is _nothing:
        signal.set_wakeup_fd(-1)
        for number in NUMBERS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
