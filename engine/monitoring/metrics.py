"""Where numbers go: one JSON line and one point on each board per log, and a progress bar or plain lines for people.

Only `log` waits for the device. Nothing here ends a training: a full disk or a closed terminal costs the line alone.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from fusionreid.engine.monitoring import memory
from fusionreid.engine.monitoring.jsonl import drop_after, points_of, to_host, with_nulls
from fusionreid.engine.monitoring.loggers import Board, TensorBoard
from fusionreid.engine.monitoring.startup import Startup

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
log = logging.getLogger(__name__)


class Metrics:
    """The numbers of one run, written by the rank for which `enabled` is true.

    A run that goes on after `start_step` drops later lines of the run before it: metrics.jsonl reads as if unbroken.
    `boards` open by name, TensorBoard alone if None; of `peak_images_per_s`, where it is known, MFU is the share.
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        enabled: bool = True,
        start_step: int = 0,
        *,
        boards: Mapping[str, Callable[[], Board]] | None = None,
        peak_images_per_s: float | None = None,
        startup: Startup | None = None,
    ) -> None:
        self.enabled, self.steps = enabled, 0  # finished by this process
        self._lines = Path(output_dir) / "metrics.jsonl"
        self._total_steps, self._start_step = total_steps, start_step
        self._start = self._window_start = perf_counter()
        self._images, self._waited = 0, 0.0  # since the last log
        self._all_images, self._idle = 0, 0.0  # images in all; seconds of pauses
        self._peak_images_per_s, self._startup = peak_images_per_s, startup
        self._bar: Any = None
        self._boards: dict[str, Board] = {}
        self._failed: set[str] = set()
        if enabled:
            with self._forgiving("metrics.jsonl"):
                drop_after(self._lines, start_step)
            plain = {"tensorboard": lambda: TensorBoard(Path(output_dir), start_step)}
            for name, open_board in (plain if boards is None else boards).items():
                with self._forgiving(name):
                    self._boards[name] = open_board()

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time spent waiting for each is counted."""
        iterator = iter(batches)
        while True:
            start = perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += perf_counter() - start
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in here (evaluation, a checkpoint) does not count as training time."""
        start = perf_counter()
        try:
            yield
        finally:
            self._window_start += perf_counter() - start
            self._idle += perf_counter() - start

    def progress(self, step: int, images: int) -> None:
        """Count the images of a finished step (numbered from 1) and move the bar; only the first one is waited for."""
        self.steps += 1
        self._images += images
        self._all_images += images
        if not self.enabled:
            return
        if self._startup is not None:
            self.event(self._startup.first_step())
            self._startup = None
        with self._forgiving("progress bar"):
            if self._bar is None and sys.stdout is not None and sys.stdout.isatty():
                from tqdm import tqdm  # type: ignore[import-untyped]

                self._bar = tqdm(
                    desc="train", total=self._total_steps * images, initial=(step - 1) * images, unit=" images",
                    unit_scale=True, dynamic_ncols=True, file=sys.stdout,
                )  # fmt: skip
            if self._bar is not None:
                self._bar.update(images)

    def log(self, step: int, **scalars: "Tensor | float") -> dict[str, Any]:
        """Write scalars, or short vectors, under their names and return them as numbers.

        All tensors, which share a device, cross to the host in one copy: the only wait for the device. Images per
        second, MFU and the share of time spent waiting for data are added for the steps since the last log; the peak
        of memory is that of the process. What is not finite is null in JSON, which has no word for it.
        """
        if not self.enabled:
            return {}
        values = to_host(scalars)
        now = perf_counter()
        if self._images:
            seconds = now - self._window_start
            speed = self._images / seconds
            values |= {"images_per_s": speed, "data_wait": self._waited / seconds, "peak_gib": memory.peak() / 2**30}
            values |= {"mfu": speed / self._peak_images_per_s} if self._peak_images_per_s else {}
        self._window_start, self._images, self._waited = now, 0, 0.0
        line = {"step": step, **values, "seconds": round(now - self._start, 3)}
        with self._forgiving("metrics.jsonl"):
            self._lines.parent.mkdir(parents=True, exist_ok=True)
            with open(self._lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(with_nulls(line), allow_nan=False) + "\n")
        points = points_of(values)
        for name, board in self._boards.items():
            with self._forgiving(name):
                board.draw(step, points)
        with self._forgiving("console"):
            self._show(step, values, now - self._start)
        return values

    def event(self, text: str) -> None:
        """Say one thing to people: where a checkpoint went, the result of an evaluation."""
        if not self.enabled or sys.stdout is None:
            return
        with self._forgiving("console"):
            encoding = sys.stdout.encoding or "utf-8"
            text = text.encode(encoding, "backslashreplace").decode(encoding)
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)

    def close(self) -> None:
        """Finish the bar and the boards, and say what the run took."""
        with self._forgiving("progress bar"):
            if self._bar is not None:
                self._bar.close()
        self._bar = None
        for name, board in self._boards.items():
            with self._forgiving(name):
                board.close()
        if self.steps:
            elapsed = perf_counter() - self._start
            speed, peak = self._all_images / (elapsed - self._idle), memory.peak() / 2**30
            took = timedelta(seconds=round(elapsed))
            self.event(f"{self.steps} steps in {took}, {speed:.4g} images/s in training, peak {peak:.2f} GiB")

    def _show(self, step: int, values: Mapping[str, Any], elapsed: float) -> None:
        texts = {name: f"{value:.4g}" for name, value in values.items() if isinstance(value, float)}
        if self._bar is not None:
            with self._forgiving("progress bar"):
                self._bar.set_postfix({k: v for k, v in texts.items() if k != "images_per_s"})
            return
        total = max(step, self._total_steps)
        left = timedelta(seconds=round((total - step) * elapsed / max(step - self._start_step, 1)))
        shown = "  ".join(f"{name} {text}" for name, text in texts.items())
        self.event(f"step {step}/{total}  {shown}  left {left}")

    @contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                log.warning("%s: %s; training goes on, this is said once", what, error)
