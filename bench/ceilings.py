"""Limits of the machine at hand: bytes per second of a copy, operations per second of a matrix product."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.timing import Settings, clock

ROUNDS = 20


@dataclass(frozen=True)
class Ceilings:
    """Limits of a machine."""

    bytes_per_s: float
    operations_per_s: float

    def limit_ms(self, bytes_moved: float | None, operations: float | None) -> float | None:
        """Return the time that no implementation beats unless its inputs are in a cache; None if nothing is known."""
        if bytes_moved is None and operations is None:
            return None
        return 1e3 * max((bytes_moved or 0) / self.bytes_per_s, (operations or 0) / self.operations_per_s)


def measure_ceilings(settings: Settings) -> Ceilings:
    """Measure the best of some rounds: a copy far larger than the caches, a square product in `settings.dtype`."""
    gpu, quick = settings.device.type == "cuda", settings.size == "quick"
    count, side = (2**20, 128) if quick else (2**29, 8192) if gpu else (2**27, 2048)
    source = torch.ones(count, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=settings.dtype, device=settings.device) for _ in range(2))
    out = torch.empty_like(a)
    copy_ms = _best(lambda: target.copy_(source), settings)
    product_ms = _best(lambda: torch.mm(a, b, out=out), settings)
    return Ceilings(2e3 * count / copy_ms, 2e3 * side**3 / product_ms)


def _best(call: Callable[[], object], settings: Settings) -> float:
    measure = clock(settings.device)
    return min(measure(call) for _ in range(ROUNDS))
