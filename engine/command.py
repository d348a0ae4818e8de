"""The door every command goes through: arguments, the graceful stop, one message and exit code per kind of failure."""

import argparse
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import TextIOWrapper
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any, TextIO

from fusionreid.engine.config import Config, load_config
from fusionreid.engine.monitoring import memory
from fusionreid.errors import ReIDError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
REASONS = {0: "done", 130: "stopped by SIGINT", 143: "stopped by SIGTERM"}
EXIT = "exit.json"
RANK = int(os.environ.get("RANK", "0"))

log = logging.getLogger(__name__)
REPEAT_S = 1.0  # a launcher passes on the terminal's signal: within this time it is one and the same


class OutputFolderError(ReIDError, RuntimeError):
    """The output folder cannot be used: another run has it, or it cannot be written."""


class Stop:
    """The wish to stop: the first SIGINT or SIGTERM is remembered, a second one ends the process at once."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._since = 0.0
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    @property
    def flag(self) -> int:
        """The signal's number, or 0: the largest over all ranks is the wish of any."""
        return self.requested or 0

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = number, monotonic()
        elif monotonic() - self._since > REPEAT_S:
            os._exit(128 + number)


class Output:
    """An output that may go away, as under `| head`: what it does not take is dropped, and that is said once."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.failed = stream, False

    def write(self, text: str) -> int:
        """Write, or drop."""
        self._do(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        self._do(self.stream.flush)

    def _do(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (OSError, ValueError) as error:
            if not self.failed:
                self.failed = True  # first: where this is standard error, the warning comes here too
                log.warning("standard output cannot be written (%s): what follows is dropped", error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def lock(output_dir: Path) -> TextIO:
    """Make and take the output folder until the returned file is closed or this process ends, however it ends."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(output_dir, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        file = open(output_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  open as long as the run
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                owner = file.read() or "another process"
            message = f"OUTPUT_DIR {output_dir} is in use by {owner}: wait for it or set another OUTPUT_DIR"
            raise OutputFolderError(message) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except OSError as error:
        raise OutputFolderError(f"OUTPUT_DIR {output_dir} cannot be written: {error}; set another one") from error
    os.register_at_fork(after_in_child=file.close)  # a data worker must not hold the lock of a dead run
    return file


def run(
    work: Callable[..., int | None], argv: Sequence[str] | None = None, flags: Mapping[str, str] | None = None
) -> int:
    """Read the arguments, call `work(cfg, <flag>=bool, ...)` and turn the way it ends into an exit code.

    `flags` are switches with their help, {"--baselines": "also ..."}. Code and reason also go to OUTPUT_DIR/exit.json,
    since torchrun answers 1 whatever its processes answer.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # LANG=C has no letters for many names
    output, errors = (Output(stream) if stream else None for stream in (sys.stdout, sys.stderr))
    options = _arguments(work, argv, flags or {})
    output_dir: Path | None = None

    def end_at_once(number: int, _frame: FrameType | None) -> None:
        """Until the loop takes over; an exception out of the middle of an import would tear torch apart."""
        with suppress(OSError):
            os.write(2, f"{REASONS[128 + number]}\n".encode())
        _leave_word(output_dir, 128 + number, REASONS[128 + number], work)
        os._exit(128 + number)

    previous = {number: signal.signal(number, end_at_once) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            cfg = load_config(options.pop("config_file"), options.pop("overrides"))
            if options.pop("print_config"):
                print(cfg.dump())
                return 0
            output_dir = Path(cfg.OUTPUT_DIR)
            if RANK == 0:
                print("".join(f"{note}\n" for note in cfg.notes), end="", file=sys.stderr)
                with suppress(OSError):
                    (output_dir / EXIT).unlink()
            code = work(cfg, **options) or 0
        reason = REASONS.get(code, "")
    except BaseException as error:
        code, reason = _explain(error, cfg if output_dir else None)
        if isinstance(error, OutputFolderError):
            output_dir = None  # the folder is another run's
        with suppress(OSError, ValueError):
            who = f"[rank {RANK}] " if RANK else ""
            print(f"{who}{reason}" if code in REASONS else f"{who}error: {reason}", file=sys.stderr, flush=True)
    finally:
        for signal_number, handler in previous.items():
            signal.signal(signal_number, handler)
        _flush()
    _leave_word(output_dir, code, reason, work)
    return code


def _leave_word(output_dir: Path | None, code: int, reason: str, work: Callable[..., int | None]) -> None:
    if output_dir and (RANK == 0 or code):
        with suppress(OSError), open(output_dir / EXIT, "x", encoding="utf-8") as file:  # the first reason stays
            json.dump({"code": code, "reason": reason, "command": work.__name__, "rank": RANK}, file, indent=2)


def _arguments(work: Callable[..., int | None], argv: Sequence[str] | None, flags: Mapping[str, str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=sys.modules[work.__module__].__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config_file", required=True, metavar="FILE", help="YAML file, one of configs/")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and end")
    for flag, text in flags.items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="as in SOLVER.BASE_LR 0.01; KEY=VALUE too")
    return vars(parser.parse_intermixed_args(argv))


def _explain(error: BaseException, cfg: Config | None) -> tuple[int, str]:
    """Exit code and reason; what has no code of its own is our mistake, so its traceback is shown."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, REASONS[130]
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code, REASONS.get(error.code, f"exit code {error.code}")
    if memory.ran_out(error):
        return 6, memory.advice(error, cfg)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return 4, f"{error}: make room or set another OUTPUT_DIR"
    traceback.print_exception(error)
    return 1, f"{type(error).__name__}: {error}"


def _flush() -> None:
    """What stdout still holds; if nobody reads it any more, Python must not fail over it at its very end."""
    with suppress(AttributeError, ValueError):
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
