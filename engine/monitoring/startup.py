"""Time from the start of the process to its first step, by part."""

import sys
from time import perf_counter


class Startup:
    """Stopwatch with laps, from its creation to the first step."""

    def __init__(self) -> None:
        self._start = self._last = perf_counter()
        self._laps: list[tuple[str, float]] = []

    def lap(self, name: str) -> None:
        """Count the time since the previous lap under this name."""
        now = perf_counter()
        self._laps.append((name, now - self._last))
        self._last = now

    def first_step(self) -> str:
        """Wait for the device and return all laps in one line."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.lap("step")
        parts = ", ".join(f"{seconds:.1f} s {name}" for name, seconds in self._laps)
        return f"first step after {self._last - self._start:.1f} s: {parts}"
