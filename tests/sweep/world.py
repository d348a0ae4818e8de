"""A run with everything that it leaves behind, the commands that read it back, and what became of a damaged file.

Which command opens which file is not written down here: it is seen in a run over files that are whole. A new kind of
file is covered as soon as a command reads it.
"""

import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fusionreid.engine import cli
from fusionreid.engine.checkpoints import checkpoint
from tests.runs import arguments, command, draw_crops, interrupt

HANG_S = 60  # a command on these files takes one or two, an export ten; many more where other work runs
GROWTH_KIB = 512 * 1024
CODES = {2, 3, 4, 5}  # of a refusal
OWN = ["--data", "crops", "--name", "own", "MODEL.RES_NAME=test_resnet", "MODEL.TRANSFORMER_TYPE=test_vit",
       "MODEL.MIX_DIM=24", "INPUT.SIZE_TRAIN=(32, 16)", "INPUT.SIZE_TEST=(32, 16)", "SOLVER.MAX_EPOCHS=2",
       "SOLVER.EVAL_PERIOD=1", "DATALOADER.NUM_WORKERS=0", "SOLVER.PRECISION=fp32"]  # fmt: skip
TIMES = {"seconds", "images_per_s", "data_wait", "peak_gib"}  # of a log line: never the same twice
EDITABLE = {"config.yml", "data.csv"}  # the user's own to change: what stands there is followed
UNREAD = re.compile(r".*(\.lock|\.jpg|/crops/.*)")  # pictures have a sweep of their own


@dataclass
class World:
    """Data and runs as they were left, and the place of the copy that a command works in."""

    folder: Path
    place: Path
    readers: dict[str, "Reader"] = field(default_factory=dict)
    opened: dict[Path, list[str]] = field(default_factory=dict)  # relative path -> commands that open it
    expected: dict[str, object] = field(default_factory=dict)  # by command
    seconds: dict[str, float] = field(default_factory=dict)  # that each takes


@dataclass(frozen=True)
class Reader:
    """A command on a copy of the world, and what it computes there."""

    argv: list[str]
    result: Callable[[], object]


@dataclass(frozen=True)
class Outcome:
    """What a command did, and how that is to be judged: survived, refused or told are well, lost and silent are not."""

    kind: str
    text: str

    @property
    def is_well(self) -> bool:
        return self.kind in ("survived", "refused", "told")


def weights(run: str) -> object:
    """Digest of all tensors in the newest checkpoint, and all numbers of the log that are no times."""
    path = checkpoint.latest(Path(run) / "checkpoints")
    assert path is not None
    tensors, state = checkpoint.load(path)
    digest = blake2b()
    for part, entries in sorted(tensors.items()):
        for name, tensor in sorted(entries.items()):
            digest.update(f"{part} {name}".encode() + tensor.contiguous().flatten().view(-1).numpy().tobytes())
    metrics = Path(run, "metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    log = [{key: value for key, value in line.items() if key not in TIMES | {"crc32"}} for line in lines]
    return digest.hexdigest(), state["step"], log


def measures(run: str) -> object:
    return json.loads(Path(run, "metrics.json").read_text())["results"]


def small(run: str, **keys: object) -> list[str]:
    return arguments(Path("data"), Path(run), SOLVER__EVAL_PERIOD=1, **keys)


def readers() -> dict[str, Reader]:
    """All commands that read what a run keeps; the newest checkpoint of `run` is named by its folder's name."""
    newest = checkpoint.checkpoints(Path("run/checkpoints"))[-1]
    tune = {"MODEL__PRETRAIN_CHOICE": "checkpoint", "SOLVER__MAX_EPOCHS": 1, "SOLVER__WARMUP_ITERS": 0}
    search = ["search", "--query", "run", "--gallery", "run", "--json", "found.json"]
    return {
        "resume": Reader(["train", *small("half")], lambda: weights("half")),
        "fine-tune": Reader(["train", *small("tuned", MODEL__PRETRAIN_PATH=newest, **tune)], lambda: weights("tuned")),
        "evaluate": Reader(["evaluate", *small("run")], lambda: measures("run")),
        "evaluate the best": Reader(["evaluate", *small("run", TEST__WEIGHT="best")], lambda: measures("run")),
        "rank again": Reader(["evaluate", *small("run", TEST__EMBEDDINGS="run")], lambda: measures("run")),
        "embed": Reader(
            ["embed", *small("run"), "--images", "data/synthetic/query", "--output", "vectors"],
            lambda: {path.name: path.read_bytes() for path in sorted(Path("vectors").iterdir())},
        ),
        "search": Reader(search, lambda: Path("found.json").read_text()),
        "report": Reader(["report", *small("run"), "--compare", "half"], lambda: Path("run/report.html").read_text()),
        "doctor": Reader(["doctor", *small("run")], lambda: None),
        "train on own data": Reader(["train", *OWN], lambda: weights("log/own")),
        "evaluate own data": Reader(
            ["evaluate", "--config_file", "log/own/config.yml", *OWN[4:]], lambda: measures("log/own")
        ),
    }


def build(folder: Path) -> World:
    """Make the world by the commands themselves, and see which file each of them opens."""
    world = World(folder / "kept", folder / "world")
    folder = world.place
    folder.mkdir()
    draw_crops(folder / "crops")
    with within(folder):
        code, text = interrupt(command(*small("half")), Path("half"), 9, signal.SIGTERM)
        assert code == 143, text
        for argv in (["train", *small("run")], ["evaluate", *small("run")], ["train", *OWN]):
            code, text = run(argv)
            assert code == 0, text
        shutil.rmtree(checkpoint.checkpoints(Path("log/own/checkpoints"))[-1])  # half of its way is left to go
        world.readers = readers()
    folder.rename(world.folder)
    for name, reader in world.readers.items():
        with copied(world) as copy, traced(copy) as paths:
            start = time.monotonic()
            code, text = run(reader.argv)
            world.seconds[name] = time.monotonic() - start
            assert code == 0, text
            world.expected[name] = reader.result()
        for path in sorted(path.relative_to(copy) for path in paths):
            if not UNREAD.fullmatch(f"/{path}"):
                world.opened.setdefault(path, []).append(name)
    return world


@contextmanager
def within(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def copied(world: World) -> Iterator[Path]:
    """A copy of the world for one command, times of files included, where it was made: some files name the place."""
    shutil.rmtree(world.place, ignore_errors=True)
    shutil.copytree(world.folder, world.place)
    with within(world.place):
        yield world.place


@dataclass
class Trace:
    """The files that are read, of those that were there before."""

    whole: set[int]  # inodes
    paths: set[Path] = field(default_factory=set)


_trace: Trace | None = None


def _hook(event: str, given: tuple[Any, ...]) -> None:
    if _trace is None or event != "open" or not isinstance(given[0], str | bytes | os.PathLike):
        return
    with suppress(OSError, ValueError):
        path = os.path.abspath(os.fsdecode(given[0]))
        if given[2] & os.O_ACCMODE != os.O_WRONLY and os.stat(path).st_ino in _trace.whole:
            _trace.paths.add(Path(path))


sys.addaudithook(_hook)


@contextmanager
def traced(folder: Path) -> Iterator[set[Path]]:
    """The files in a folder that are opened meanwhile to be read, by any code in Python."""
    global _trace
    _trace = Trace({path.stat().st_ino for path in folder.rglob("*") if path.is_file()})
    try:
        yield _trace.paths
    finally:
        _trace = None


class Hang(BaseException):
    """A command was still running after `HANG_S`."""


@contextmanager
def limited() -> Iterator[None]:
    """`Hang` in what takes far too long."""

    def hang(*_: object) -> None:
        raise Hang

    outer = signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, outer)


def run(argv: list[str]) -> tuple[int, str]:
    """Exit code of a command and all that it says; -1 if it hangs, -2 if it takes far more memory than such files."""
    said, code = io.StringIO(), -1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(Hang), limited(), redirect_stdout(said), redirect_stderr(said):
        try:
            code = cli.main(argv)
        except SystemExit as error:  # of the parser
            code = int(error.code or 0)
    if "Hang" in said.getvalue():
        code = -1
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > GROWTH_KIB:
        code = -2
    return code, said.getvalue()


def judge(world: World, name: str, path: Path, damage: Callable[[Path], None]) -> Outcome:
    """Damage the file in a copy of the world, run the command there, and compare with what it did on whole files."""
    reader = world.readers[name]
    with copied(world) as copy:
        damage(copy / path)
        code, text = run(reader.argv)
        if code == 0:
            try:
                same = reader.result() == world.expected[name]
            except OSError:
                same = False
            if same or path.name in EDITABLE:
                return Outcome("survived", text)
            warnings = [line for line in text.splitlines() if " WARNING " in line or "differs from the start" in line]
            return Outcome("told" if any(path.name in line for line in warnings) else "silent", text)
    named = path.name in text or path.parent.name in text or path.name in EDITABLE  # there a key or a line is named
    is_refusal = code in CODES and named and "Traceback" not in text and "\x1b" not in text
    return Outcome("refused" if is_refusal else "lost", f"exit {code}: {text}")
