"""Metrics of a training: one JSON line and one point in each logger per log, and a progress bar or plain lines.

Only `log` waits for the device. Nothing here ends a training: a full disk or a closed terminal costs the line alone.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from fusionreid.engine.monitoring import memory
from fusionreid.engine.monitoring.jsonl import drop_after, line_of, points_of, to_host
from fusionreid.engine.monitoring.loggers import Logger, TensorBoard
from fusionreid.engine.monitoring.startup import Startup
from fusionreid.files import append_to

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
log = logging.getLogger(__name__)


class Metrics:
    """The numbers of one run, written by the rank for which `enabled` is true.

    A run that goes on after `start_step` drops later lines of the run before it: metrics.jsonl reads as if unbroken.
    With `evaluate_again` it drops the evaluation of that step too. Every `log_period` steps there was a line.
    `loggers` are opened by name, TensorBoard alone if None; MFU is the share of `peak_images_per_s` if that is known.
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        enabled: bool = True,
        start_step: int = 0,
        *,
        evaluate_again: bool = False,
        log_period: int = 1,
        loggers: Mapping[str, Callable[[], Logger]] | None = None,
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
        self._loggers: dict[str, Logger] = {}
        self._failed: set[str] = set()
        if enabled:
            with self._forgiving("metrics.jsonl"):
                drop_after(self._lines, start_step, start_step - evaluate_again, log_period)
            default = {"tensorboard": lambda: TensorBoard(Path(output_dir), start_step)}
            for name, open_logger in (default if loggers is None else loggers).items():
                with self._forgiving(name):
                    self._loggers[name] = open_logger()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass the batches on and count the time spent waiting for each."""
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
        """Context manager: time in here (evaluation, a checkpoint) does not count as training time."""
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

    def log(self, step: int, **scalars: "Tensor | list[float] | float") -> dict[str, Any]:
        """Write scalars, or short vectors, under their names and return them as numbers.

        All tensors, which share a device, cross to the host in one copy: the only wait for the device. Images per
        second, MFU and the share of time spent waiting for data are added for the steps since the last log; the peak
        of memory is that of the process. Numbers that are not finite become null in JSON.
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
        self._write(step, values, seconds=round(now - self._start, 3))
        with self._forgiving("console"):
            self._show(step, values, now - self._start)
        return values

    def log_evaluation(self, step: int, epoch: int, measures: Mapping[str, float], of: str = "") -> None:
        """Write the measures of an evaluation under `eval/`, `of` and their names, on a line of their own."""
        if self.enabled:
            values = {f"eval/{of}{name}": float(value) for name, value in measures.items()}
            self._write(step, {"epoch": float(epoch), **values})

    def event(self, text: str) -> None:
        """Print one line for people: where a checkpoint went, the result of an evaluation."""
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
        """Finish the bar and the loggers, and print what the run took."""
        with self._forgiving("progress bar"):
            if self._bar is not None:
                self._bar.close()
        self._bar = None
        for name, logger in self._loggers.items():
            with self._forgiving(name):
                logger.close()
        if self.steps:
            elapsed = perf_counter() - self._start
            speed, peak = self._all_images / (elapsed - self._idle), memory.peak() / 2**30
            took = timedelta(seconds=round(elapsed))
            self.event(f"{self.steps} steps in {took}, {speed:.4g} images/s in training, peak {peak:.2f} GiB")

    def _write(self, step: int, values: Mapping[str, Any], **more: float) -> None:
        """One line of JSON, with `more` only there, and one point in each logger."""
        with self._forgiving("metrics.jsonl"):
            self._lines.parent.mkdir(parents=True, exist_ok=True)
            with append_to(self._lines) as file:
                file.write(line_of({"step": step, **values, **more}))
        points = points_of(values)
        for name, logger in self._loggers.items():
            with self._forgiving(name):
                logger.log(step, points)

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
                log.warning("%s: %s; training continues; this is reported once", what, error)
