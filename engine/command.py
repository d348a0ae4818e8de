"""How every command runs: arguments, signals, logs, and one message and exit code per kind of failure."""

import errno
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionreid.engine.arguments import Command, Parser, command_line, command_parser
from fusionreid.engine.distributed import peers
from fusionreid.engine.signals import REASONS, Signals
from fusionreid.engine.storage import OutputFolderError
from fusionreid.engine.text_log import FolderHandler, logging_to, visible

if TYPE_CHECKING:
    from fusionreid.engine.config import Config

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
PLACE_ERRORS = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EIO)
EXIT = "exit.json"
RANK = int(os.environ.get("RANK", "0"))

log = logging.getLogger(__name__)


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


class Results(Output):
    """Standard output: control characters are shown as escapes, and each whole line also goes to `file`."""

    def __init__(self, stream: Any, file: FolderHandler | None) -> None:
        super().__init__(stream)
        self._file, self._line = file, ""

    def write(self, text: str) -> int:
        """Write with control characters made visible, each whole line to the file too."""
        super().write(visible(text))
        if self._file is not None:
            *lines, self._line = (self._line + text).split("\n")
            for line in lines:
                self._file.handle(logging.LogRecord("stdout", logging.INFO, "", 0, line, None, None))
        return len(text)


class Outcome:
    """The way a command ends, for the people at the terminal, for log.txt and for OUTPUT_DIR/exit.json."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder: Path | None = None  # OUTPUT_DIR, once it is known and unless it is another run's
        self.file: FolderHandler | None = None

    def at_once(self, number: int) -> None:
        """End here and now: an exception out of the middle of an import would tear torch apart."""
        if lost := peers.lost_before_signal():  # which is why torchrun ends this process too
            self.tell_loss(lost)
            os._exit(peers.PeerError.exit_code)
        peers.stop(done=True)
        reason = REASONS[128 + number]
        with suppress(OSError):
            os.write(2, f"{reason}\n".encode())
        self.write(128 + number, reason)
        os._exit(128 + number)

    def tell(self, code: int, reason: str, error: BaseException) -> None:
        """Print what happened; a traceback only where it is our mistake."""
        with suppress(OSError, ValueError):
            if code == 1:
                traceback.print_exception(error)
            who = f"[rank {RANK}] " if RANK else ""
            text = f"{who}{reason}" if code in REASONS else f"{who}error: {reason}"
            print(visible(text), file=sys.stderr, flush=True)
        if self.file is not None and RANK == 0:
            why = (type(error), error, error.__traceback__) if code == 1 else None
            level = logging.INFO if code in REASONS else logging.ERROR
            self.file.handle(logging.LogRecord("command", level, "", 0, reason, None, why))

    def tell_loss(self, reason: str) -> None:
        """Tell and write that another process of the run is lost, which ends this one."""
        error = peers.PeerError(reason)
        self.tell(error.exit_code, reason, error)
        self.write(error.exit_code, reason)

    def write(self, code: int, reason: str) -> None:
        """Code and reason as exit.json, since torchrun answers 1 whatever its processes answer; the first one stays."""
        if self.folder is None or not self.folder.is_dir() or (RANK and not code) or (self.folder / EXIT).exists():
            return
        from fusionreid.files import write_json

        try:
            write_json(self.folder / EXIT, {"code": code, "reason": reason, "command": self.name, "rank": RANK})
        except OSError as error:
            with suppress(OSError, ValueError):
                print(f"{self.folder / EXIT} cannot be written: {error}", file=sys.stderr)


def run(command: Command, argv: Sequence[str] | None = None, parser: Parser | None = None) -> int:
    """Read the arguments, do the command's work, and turn the way it ends into an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # LANG=C has no letters for many names
    options = vars((parser or command_parser(command)).parse(sys.argv[1:] if argv is None else argv))
    outcome = Outcome(command.name)
    peers.tell_losses(outcome.tell_loss)
    errors = Output(sys.stderr) if sys.stderr else None
    with Signals(outcome.at_once), logging_to(errors) as file:
        output = Results(sys.stdout, file if RANK == 0 else None) if sys.stdout else None
        with redirect_stdout(output), redirect_stderr(errors):
            code, reason = _attempt(command, options, outcome, file)
        _flush()
        outcome.write(code, reason)
        peers.stop(done=code == 0)
    return code


def _attempt(command: Command, options: dict[str, Any], outcome: Outcome, file: FolderHandler) -> tuple[int, str]:
    """Do the work; exit code and reason."""
    cfg: Config | None = None
    try:
        from fusionreid.engine.config import load_config

        given = {name: options.pop(name) for name in ("config_file", "overrides")}
        if (data := options.pop("data", None)) is not None:
            from fusionreid.engine import own_run

            folder = own_run.folder_of(data, options["name"], given["overrides"])
            run = own_run.prepare(
                data, folder, given["overrides"], examine=command.examines, account=options.get("json"), quiet=RANK > 0
            )
            given["config_file"] = str(run.settings)
            options |= {"own": run.own} if command.examines else {}
        options.pop("name", None)
        cfg = load_config(given["config_file"] or os.devnull, given["overrides"])
        if options.pop("print_config"):
            print(cfg.dump())
            return 0, ""
        if given["config_file"]:
            outcome.folder = file.folder = Path(cfg.OUTPUT_DIR)
            outcome.file = file
        if RANK == 0:
            for note in cfg.notes:
                log.info(note)
            if outcome.folder:
                with suppress(OSError):
                    (outcome.folder / EXIT).unlink()
        code = command.work(cfg, **options) or 0
        if code == 0 and RANK == 0:
            _say_what_is_next(command, cfg, given, options)
        return code, REASONS.get(code, "done")
    except BaseException as error:
        code, reason = _explain(error, cfg)
        if isinstance(error, OutputFolderError):
            outcome.folder = outcome.file = None  # the folder is another run's
        outcome.tell(code, reason, error)
        if code in REASONS and RANK == 0 and command.interrupted:
            log.info(command.interrupted)
        return code, reason


def _say_what_is_next(command: Command, cfg: "Config", given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    ending = command.ending(cfg, **options)
    if ending.wrote:
        log.info("wrote %s", ", ".join(map(str, ending.wrote)))
    following = ending.following
    if following.isalpha():  # a command: with the settings of this one
        settings = shlex.join(["--config_file", given["config_file"], *given["overrides"]])
        following = f"{command_line(following)} {settings}"
    if following:
        log.info("next: %s", following)


def _explain(error: BaseException, cfg: "Config | None") -> tuple[int, str]:
    """Exit code and reason; what has no code of its own is our mistake."""
    from fusionreid.engine.monitoring import memory

    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, REASONS[130]
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code, REASONS.get(error.code, f"exit code {error.code}")
    if lost := peers.explain(error):
        return peers.PeerError.exit_code, lost
    if memory.ran_out(error):
        return 6, memory.advice(error, cfg)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return 4, f"{error}: make room or set another OUTPUT_DIR"
    if isinstance(error, OSError) and error.errno in PLACE_ERRORS and error.filename is not None:
        return 4, f"{error}: remove what is in its place, or set another OUTPUT_DIR"
    return 1, f"{type(error).__name__}: {error}"


def _flush() -> None:
    """Flush stdout; if nobody reads it any more, Python must not fail over it at its very end."""
    with suppress(AttributeError, ValueError):
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
