"""Logs hold what was given, wait for the device once, and never end a training."""

import fcntl
import io
import json
import os
import pty
import struct
import sys
import termios
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import AtomicCounter

from fusionreid.engine.monitoring import metrics
from fusionreid.engine.monitoring.metrics import Metrics
from fusionreid.engine.monitoring.startup import Startup


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_copy_to_the_host_and_the_same_numbers_everywhere(tmp_path: Path, monkeypatch, capsys) -> None:
    log = Metrics(tmp_path, total_steps=10)
    copies = []
    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__bool__"):
        whole = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, *a, n=name, f=whole: copies.append(n) or f(t, *a))
    loss = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    values = log.log(4, loss=loss, triplet=torch.tensor([1.5, 2.5]), learning_rate=0.005)
    assert copies == ["tolist"]
    log.close()
    assert values == {"loss": 0.1, "triplet": [1.5, 2.5], "learning_rate": 0.005}  # no images, so no speed
    (line,) = lines(tmp_path)
    assert line.pop("seconds") >= 0
    assert line.pop("crc32")
    assert line == {"step": 4, **values}
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = {tag: [(p.step, p.value) for p in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert points["triplet/1"] == [(4, 2.5)]
    assert points["loss"] == [(4, pytest.approx(0.1))]
    out = capsys.readouterr().out
    assert out.startswith("step 4/10  loss 0.1  learning_rate 0.005  left 0:00:0")
    assert "\r" not in out


def test_speed_waiting_and_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Row 36 too: the wall clock goes back a day and nothing notices."""
    clock, wall = [100.0], [2e9]
    monkeypatch.setattr(metrics, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: wall.append(wall[-1] - 86_400) or wall[-1])

    def batches():
        for batch in range(4):
            clock[0] += 0.5
            yield batch

    monkeypatch.setattr(metrics.memory, "peak", lambda: 3 * 2**30)
    log = Metrics(tmp_path, total_steps=8, peak_images_per_s=80.0)
    for step, _ in enumerate(log.timed(batches()), 1):
        clock[0] += 1.5
        log.progress(step, images=64)
    with log.paused():
        clock[0] += 1000.0
    values = log.log(4, loss=1.0)
    assert values == {"loss": 1.0, "images_per_s": 4 * 64 / 8, "data_wait": 0.25, "peak_gib": 3.0, "mfu": 0.4}
    out = capsys.readouterr().out
    assert "images_per_s 32  data_wait 0.25  peak_gib 3  mfu 0.4  left 0:16:48" in out  # as long as until now
    clock[0] += 2.0
    log.progress(5, images=64)
    assert log.log(5)["images_per_s"] == 32  # a new window
    log.close()
    assert capsys.readouterr().out.endswith("\n5 steps in 0:16:50, 32 images/s in training, peak 3.00 GiB\n")


def test_a_resumed_run_reads_as_if_unbroken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Files of one second and process are read in the order of a counter's digits, where 10 comes before 9.
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(0))
    log = Metrics(tmp_path, total_steps=10)
    for step in (1, 2, 3):
        log.log(step, loss=float(step))
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')  # killed while writing
    log = Metrics(tmp_path, total_steps=10, start_step=2)
    log.log(3, loss=30.0)
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 30)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(p.step, p.value) for p in board.Scalars("loss")] == [(1, 1), (2, 2), (3, 30)]


def test_other_ranks_write_nothing(tmp_path: Path, capsys) -> None:
    log = Metrics(tmp_path / "log", total_steps=10, enabled=False)
    log.progress(1, 64)
    assert log.log(1, loss=torch.tensor(1.0, device="meta")) == {}  # a meta tensor has no value: it was not read
    log.event("nothing")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


class Broken(io.StringIO):
    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def isatty(self) -> bool:
        return True  # so that the bar meets it too


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stdout", [lambda: None, closed, Broken, partial(open, "/dev/full", "w")])
def test_nothing_that_a_log_meets_ends_a_training(tmp_path: Path, monkeypatch, caplog, stdout) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    monkeypatch.setattr(sys, "stdout", stdout())
    log = Metrics(tmp_path, total_steps=3)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")  # a disk without room
    for step in (1, 2, 3):
        log.progress(step, 64)
        assert log.log(step, loss=torch.tensor(float(step)))["loss"] == step
        log.event("evaluated")
    log.close()
    said = [record.getMessage().split(":")[0] for record in caplog.records]
    assert said.count("metrics.jsonl") == said.count("tensorboard") == 1
    assert len(said) == len(set(said))


def test_a_board_that_fails_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Metrics(tmp_path, total_steps=3)
    monkeypatch.setattr(log._loggers["tensorboard"], "log", lambda *_: 1 / 0)
    for step in (1, 2):
        log.log(step, loss=1.0)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    log = Metrics(tmp_path, total_steps=3, loggers={})
    values = log.log(1, loss=torch.tensor(torch.nan), triplet=torch.tensor([1.0, torch.inf]))
    assert values["triplet"] == [1.0, torch.inf]
    (line,) = lines(tmp_path)
    assert (line["loss"], line["triplet"]) == (None, [1.0, None])
    assert not (tmp_path / "tensorboard").exists()


def test_the_first_step_says_where_the_time_went_once(tmp_path: Path, monkeypatch, capsys) -> None:
    clock = [5.0]
    monkeypatch.setattr("fusionreid.engine.monitoring.startup.perf_counter", lambda: clock[0])
    startup = Startup()
    for name, seconds in (("data set", 4.0), ("model", 3.1)):
        clock[0] += seconds
        startup.lap(name)
    log = Metrics(tmp_path, total_steps=3, loggers={}, startup=startup)
    clock[0] += 5.2
    log.progress(1, 64)
    log.progress(2, 64)
    assert capsys.readouterr().out == "first step after 12.3 s: 4.0 s data set, 3.1 s model, 5.2 s step\n"


def read_all(descriptor: int) -> bytes:
    """What a terminal was sent until it was closed, which comes in pieces and ends in an error."""
    parts = []
    with suppress(OSError):
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
    return b"".join(parts)


def test_plain_letters_and_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    log = Metrics(tmp_path, total_steps=3)
    log.event("größer")
    assert raw.getvalue() == b"gr\\xf6\\xdfer\n"
    log.close()
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    terminal = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", terminal)
    log = Metrics(tmp_path, total_steps=300, start_step=100)
    for step in (101, 102):
        time.sleep(0.15)  # the bar moves at most ten times a second
        log.progress(step, 64)
        log.log(step, loss=1.0)
    log.event("evaluated")
    log.close()
    terminal.close()
    shown = read_all(reader).decode()
    assert "evaluated\r\n" in shown
    assert "34%" in shown
    bar, _, last_line = shown.rpartition("2 steps in ")
    assert "images/s" in last_line
    assert max(len(line) for part in bar.split("\r") for line in part.split("\n")) <= 20


def test_a_run_without_end_is_logged(tmp_path: Path) -> None:
    log = Metrics(tmp_path, total_steps=10**18, loggers={})
    time.sleep(0.001)
    log.log(1, loss=1.0)
    assert [line["step"] for line in lines(tmp_path)] == [1]
