"""SOLVER.PROFILE: torch.profiler's trace of some training steps, for https://ui.perfetto.dev or chrome://tracing."""

import logging
from pathlib import Path
from typing import Any

from fusionreid.engine.monitoring.metrics import Metrics

WARM_UP = 10  # steps: by then all is compiled and recorded as a CUDA graph

log = logging.getLogger(__name__)


class Profiler:
    """Records `steps` steps after the warm-up of this process, on the rank that logs; 0: none."""

    def __init__(self, output: Path, steps: int, metrics: Metrics) -> None:
        self._output, self._metrics = output, metrics
        self._steps = steps if metrics.enabled else 0
        self._seen, self._first = 0, 0
        self._profiler: Any = None

    def step(self, number: int) -> None:
        """Note that the step of this number, counted from 1, is enqueued."""
        if not self._steps:
            return
        self._seen += 1
        if self._seen == WARM_UP:
            self._begin(number + 1)
        elif self._seen == WARM_UP + self._steps:
            self._end(number)

    def close(self, number: int) -> None:
        """Write what was recorded; the run ends after the step of this number."""
        if self._profiler is not None and number >= self._first:
            self._end(number)
        elif self._steps:
            self._metrics.event(f"no profile: the run ended within the {WARM_UP} steps of its warm-up")
            if self._profiler is not None:
                self._profiler.stop()
            self._steps, self._profiler = 0, None

    def _begin(self, first: int) -> None:
        from torch.profiler import profile

        self._first = first
        try:
            with self._metrics.paused():
                profiler = profile(record_shapes=True)
                profiler.start()
            self._profiler = profiler
        except Exception as error:
            self._fail(error)

    def _end(self, last: int) -> None:
        path = self._output / f"profile-{self._first}-{last}.json.gz"
        try:
            with self._metrics.paused():
                self._profiler.stop()
                self._profiler.export_chrome_trace(str(path))
            self._metrics.event(f"profile of steps {self._first} to {last}: {path}")
        except Exception as error:
            self._fail(error)
        self._steps, self._profiler = 0, None

    def _fail(self, error: Exception) -> None:
        log.warning("no profile: %s; training continues", error)
        self._steps, self._profiler = 0, None
