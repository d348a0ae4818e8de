"""Peak memory of a call: of the allocator on a GPU, of the process on a CPU."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch


def peak_gib(call: Callable[[], object], device: torch.device) -> float | None:
    """Measure how much memory a call takes at most beyond what was in use before; None where that is unknown."""
    if device.type != "cuda":
        return _resident_peak_gib(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _resident_peak_gib(call: Callable[[], object]) -> float | None:
    """By how much the resident set grew at most, once the C library has given back what it kept; on Linux only."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except (AttributeError, OSError):
        return None
    before = _resident_kib("VmRSS")
    call()
    return (_resident_kib("VmHWM") - before) / 2**20


def _resident_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
