"""Watch over the processes of a run: one that dies or hangs ends them all with a message, and none outlives torchrun.

A thread of every process counts up a number in the store that the processes share, and looks at the number of the next
process. It costs two small messages every `INTERVAL_S` and nothing in a training step. Importing this does not import
torch.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

from fusionreid.errors import ReIDError

if TYPE_CHECKING:
    from torch.distributed import Store

INTERVAL_S = 2.0
SILENCE_S = 60.0  # a process that has not counted for so long hangs, or its host is gone
GRACE_S = 20.0  # to find out who has gone, and for an orphan to save and end: torchrun's own patience is 30 s
NEWS_S = 60.0  # between two lines about what is waited for

log = logging.getLogger(__name__)


class PeerError(ReIDError, RuntimeError):
    """Another process of the run has ended or hangs, so this one cannot go on."""

    exit_code = 7


class Watch(threading.Thread):
    """Watch the next process in the circle of ranks, and the launcher if torchrun started this process."""

    def __init__(self, store: "Store", rank: int, world_size: int) -> None:
        super().__init__(name="watch over peers", daemon=True)
        self.store, self.rank, self.world_size = store.clone(), rank, world_size
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
        self.lost_launcher, self.orphan_since = f"torchrun (process {self.launcher}) has ended", 0.0
        self.next = (rank + 1) % world_size
        self.beat, self.beat_since = -1, monotonic()
        self.failures = 0  # of the store, in a row
        self.meetings = 0
        self.ended = threading.Event()
        self.store.set(f"peer/{rank}", f"{os.getpid()} {_namespace()} {socket.gethostname()}")

    @property
    def orphaned(self) -> bool:
        """Whether the launcher has ended, and with it perhaps the store."""
        return bool(self.launcher) and os.getppid() != self.launcher

    def run(self) -> None:
        """Look every `INTERVAL_S` until `ended` is set."""
        while not self.ended.wait(INTERVAL_S):
            if self.orphaned:
                self._stop_orphan()
                continue
            try:
                lost = self._look()
                self.failures = 0
            except RuntimeError:  # not at once: at the end of a run the store goes first
                self.failures += 1
                lost = LOST_STORE if self.failures * INTERVAL_S > GRACE_S / 2 else ""
            if lost and not self.ended.is_set():
                self.end(lost)

    def meet(self) -> None:
        """Wait, however long it takes, until all processes have come here as often as this one."""
        self.meetings += 1
        key, since, told = f"meeting/{self.meetings}", monotonic(), monotonic()
        count = self.store.add(key, 1)
        while count < self.world_size:
            sleep(min(0.5, (monotonic() - since) / 10 + 0.001))
            count = self.store.add(key, 0)
            if self.rank < 2 and monotonic() - told > NEWS_S:
                told = monotonic()
                missing, minutes = self.world_size - count, (told - since) / 60
                log.warning("waiting for %d of %d processes, for %.0f min now", missing, self.world_size, minutes)

    def find_lost(self, limit_s: float) -> str:
        """Look for a process that has ended, for at most this long, and count on: others look too. Empty: all live."""
        try:
            others = [rank for rank in range(self.world_size) if rank != self.rank]
            before, since = {rank: self.store.add(f"beat/{rank}", 0) for rank in others}, monotonic()
            while True:
                self.store.add(f"beat/{self.rank}", 1)
                if self.store.check(["lost"]):
                    return self.store.get("lost").decode()
                for rank in others:
                    silent = self.store.add(f"beat/{rank}", 0) == before[rank] and monotonic() - since > 4 * INTERVAL_S
                    if (self._is_gone(rank) or silent) and not self.store.check([f"left/{rank}"]):
                        return self._lose(rank)
                if monotonic() - since > limit_s:
                    return ""
                sleep(0.1)
        except RuntimeError:
            return self.lost_launcher if self.orphaned else LOST_STORE

    def _look(self) -> str:
        """Count, and say which process is lost, if one is."""
        if self.world_size == 1:
            return ""
        self.store.add(f"beat/{self.rank}", 1)
        if self.store.check(["lost"]):
            return self.store.get("lost").decode()
        beat, now = self.store.add(f"beat/{self.next}", 0), monotonic()
        if beat != self.beat:
            self.beat, self.beat_since = beat, now
        is_lost = now - self.beat_since > SILENCE_S or self._is_gone(self.next)
        return self._lose(self.next) if is_lost and not self.store.check([f"left/{self.next}"]) else ""

    def _state(self, rank: int) -> tuple[str, str]:
        """The host of a process, and what is known of it there: "has ended", "hangs" or, of another host, either."""
        if not self.store.check([f"peer/{rank}"]):
            return "unknown", "has ended or hangs"
        pid, namespace, host = self.store.get(f"peer/{rank}").decode().split(" ", 2)
        if namespace != _namespace():
            return host, "has ended or hangs"
        try:
            letter = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            letter = "X"
        return host, "has ended" if letter in "ZX" else "hangs"

    def _is_gone(self, rank: int) -> bool:
        return self._state(rank)[1] == "has ended"

    def _lose(self, rank: int) -> str:
        """Say what has become of a process, also to those that watch others."""
        host, state = self._state(rank)
        lost = f"process {rank} on host {host} {state}"
        self.store.set("lost", lost)
        return lost

    def _stop_orphan(self) -> None:
        """Ask this process to save and end, and end it if it does not."""
        if not self.orphan_since:
            self.orphan_since = monotonic()
            log.warning("%s: stopping", self.lost_launcher)
            os.kill(os.getpid(), signal.SIGTERM)
        elif monotonic() - self.orphan_since > GRACE_S:
            self.end(self.lost_launcher)

    def end(self, lost: str) -> None:
        """End this process, whose main thread may wait for ever, with exit code 7 and a message."""
        _tell(self.with_remedy(lost))
        os._exit(PeerError.exit_code)

    def with_remedy(self, lost: str) -> str:
        """The message about a lost process."""
        with suppress(RuntimeError):
            if self.store.check(["step"]):
                return f"{lost}: start again, the run goes on from step {self.store.get('step').decode()}"
        return f"{lost}: start again"


LOST_STORE = "the process that connects all others, torchrun on the first host or process 0, has ended"
_watch: Watch | None = None
_tell: Callable[[str], None] = partial(print, file=sys.__stderr__, flush=True)


def start(store: "Store", rank: int, world_size: int) -> None:
    """Begin to watch; at most one watch runs at a time."""
    global _watch
    stop()
    _watch = Watch(store, rank, world_size)
    _watch.start()


def stop(*, done: bool = False) -> None:
    """Watch no longer: this process is about to end; if its work is done, the others go on without it."""
    global _watch
    if _watch is not None:
        _watch.ended.set()
        if done:
            with suppress(RuntimeError):
                _watch.store.set(f"left/{_watch.rank}", "")
        _watch.join(GRACE_S / 4)  # Python aborts a process that ends while a thread is in the store
        _watch = None


def meet() -> None:
    """Wait, however long it takes, until every process has come here; the watch ends the wait if one dies."""
    if _watch is not None and _watch.world_size > 1:
        try:
            _watch.meet()
        except RuntimeError:
            if not _watch.orphaned:  # an orphan goes on to save without the launcher's store
                raise


def goes_on_from(step: int) -> None:
    """Leave the step of the newest checkpoint in the store, for the message about a lost process."""
    if _watch is not None:
        with suppress(RuntimeError):  # an orphan saves without the launcher's store
            _watch.store.set("step", str(step))


def tell_losses(tell: Callable[[str], None]) -> None:
    """Have `tell` called with the reason, in place of printing it, before a lost process ends this one."""
    global _tell
    _tell = tell


def explain(error: BaseException) -> str | None:
    """Say which process is lost if the error is that of a broken connection between processes; else None."""
    if _watch is None or _watch.world_size == 1 or not _is_of_connection(error):
        return None
    _watch.ended.set()  # it is told here
    lost = _watch.find_lost(GRACE_S)
    return _watch.with_remedy(lost or f"the connection to another process broke: {str(error).splitlines()[0]}")


def lost_before_signal() -> str | None:
    """Say which process was lost, for one that torchrun asks to stop because of that; takes two seconds at most."""
    watch, found = _watch, list[str]()
    if watch is not None and watch.world_size > 1:

        def look() -> None:
            if lost := watch.find_lost(0):
                found.append(watch.with_remedy(lost))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        thread.join(2)
    return found[0] if found else None


def _is_of_connection(error: BaseException) -> bool:
    """Whether torch's communication raised it; gloo's errors are RuntimeErrors that name the line of its source."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    is_named = isinstance(error, getattr(distributed, "DistError", ()))
    return is_named or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _namespace() -> str:
    """What two processes share exactly if each can see the other's number."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
