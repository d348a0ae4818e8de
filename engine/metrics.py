"""Where numbers go: one JSON line and one TensorBoard point per log, and a progress bar or plain lines for people.

Only `log` waits for the device. Nothing here ends a training: a full disk or a closed terminal costs the line alone.
"""

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
log = logging.getLogger(__name__)


class Metrics:
    """The numbers of one run, written by the rank for which `enabled` is true.

    A run that goes on after `start_step` drops later lines of the run before it: metrics.jsonl reads as if unbroken.
    """

    def __init__(self, output_dir: Path, total_steps: int, enabled: bool = True, start_step: int = 0) -> None:
        self.enabled = enabled
        self._lines = Path(output_dir) / "metrics.jsonl"
        self._total_steps, self._start_step = total_steps, start_step
        self._start = self._window_start = perf_counter()
        self._images, self._waited = 0, 0.0  # since the last log
        self._bar: Any = None
        self._board: Any = None
        self._failed: set[str] = set()
        if enabled:
            with self._forgiving("metrics.jsonl"):
                _drop_after(self._lines, start_step)
            with self._forgiving("TensorBoard"):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(Path(output_dir) / "tensorboard"), purge_step=start_step + 1)

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

    def progress(self, step: int, images: int) -> None:
        """Count the images of a finished step (numbered from 1) and move the bar; the device is not waited for."""
        self._images += images
        if not self.enabled:
            return
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
        second and the share of time spent waiting for data are added for the steps since the last log.
        """
        if not self.enabled:
            return {}
        values = _to_host(scalars)
        now = perf_counter()
        if self._images:
            seconds = now - self._window_start
            values |= {"images_per_s": self._images / seconds, "data_wait": self._waited / seconds}
        self._window_start, self._images, self._waited = now, 0, 0.0
        line = {"step": step, **values, "seconds": round(now - self._start, 3)}
        with self._forgiving("metrics.jsonl"):
            self._lines.parent.mkdir(parents=True, exist_ok=True)
            with open(self._lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        with self._forgiving("TensorBoard"):
            self._draw(step, values)
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
        """Finish the bar and the TensorBoard file."""
        with self._forgiving("progress bar"):
            if self._bar is not None:
                self._bar.close()
        with self._forgiving("TensorBoard"):
            if self._board is not None:
                self._board.close()

    def _draw(self, step: int, values: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        for name, value in values.items():
            points = {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            for point, number in points.items():
                self._board.add_scalar(point, number, step)
        self._board.flush()

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


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file at once: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _to_host(scalars: "Mapping[str, Tensor | float]") -> dict[str, Any]:
    import torch

    tensors = {name: value.detach() for name, value in scalars.items() if isinstance(value, torch.Tensor)}
    flat = torch.cat([t.reshape(-1).double() for t in tensors.values()]).tolist() if tensors else []
    values: dict[str, Any] = {}
    for name, value in scalars.items():
        count = tensors[name].numel() if name in tensors else 0
        values[name] = (flat[:count] if tensors[name].ndim else flat[0]) if name in tensors else float(value)
        flat = flat[count:]
    return values


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue  # the last line of a killed run
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
