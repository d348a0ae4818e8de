"""Where the time before the first step goes."""

import sys
from time import perf_counter


class Startup:
    """A stopwatch with laps, from its making to the first step."""

    def __init__(self) -> None:
        self._start = self._last = perf_counter()
        self._laps: list[tuple[str, float]] = []

    def lap(self, name: str) -> None:
        """All since the lap before was this."""
        now = perf_counter()
        self._laps.append((name, now - self._last))
        self._last = now

    def first_step(self) -> str:
        """The laps in a line, once the device has done what was asked of it so far."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.lap("step")
        parts = ", ".join(f"{seconds:.1f} s {name}" for name, seconds in self._laps)
        return f"first step after {self._last - self._start:.1f} s: {parts}"
