"""Cases, and how their providers are measured: checked against each other first, then in interleaved rounds.

On a GPU a call is captured as a CUDA graph, if it can be, and its replay is timed between two CUDA events: with a cold
L2, and once more with what the call itself has left there. On a CPU the clock tells, and the caches hold whatever the
other providers have left.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from bench.peak_memory import peak_gib

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # largest error relative to the largest value
FEWEST_ROUNDS, MOST_ROUNDS = 5, 200
P95_CALLS = 100  # fewer say too little of the slowest in twenty
# Before a call the device is kept busy for some 0.3 ms, in which the host enqueues all of it:
FLUSH_BYTES = 2**30  # by writing far more than any L2 holds,
SPIN_CYCLES = 500_000  # or by nothing that touches the L2


class WrongResultError(ValueError):
    """A provider's result is not that of the others: its time means nothing."""


@dataclass(frozen=True)
class Settings:
    """Size of the cases and the device that they run on."""

    size: str  # quick, default or full
    device: torch.device
    compile: bool = False  # also time a compiled version of the plain alternative
    peers: Path | None = None  # folder of the other tools' sources
    data: Path | None = None  # folder of Market-1501

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations that training uses on the device."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Work:
    """Providers by name, ours first; each call does the whole work on inputs prepared before."""

    providers: Mapping[str, Callable[[], Any]]
    tolerance: float
    bytes_moved: float | None = None  # by an ideal implementation: every input read once, every output written once
    operations: float | None = None  # likewise
    compared: Callable[[Any], Sequence[Tensor]] = field(default=tuple)  # of what a call returns
    items: int | None = None  # images that a call is for: what is wanted is their number per second
    on_host: bool = False  # what the host does is part of the work: no call is made a CUDA graph
    fewest_rounds: int = FEWEST_ROUNDS


@dataclass(frozen=True)
class Case:
    """One comparison: its name, its sizes and what makes it ready."""

    name: str
    shape: str  # sizes and dtype
    setup: Callable[[], AbstractContextManager[Work]]


@dataclass(frozen=True)
class Measurement:
    """How long one provider took, and what it needed."""

    provider: str
    rounds: int
    median_ms: float
    fast_ms: float  # 20 % quantile
    slow_ms: float  # 80 % quantile
    warm_ms: float | None  # median with a warm L2; of a CUDA graph only
    peak_gib: float | None  # above what was allocated before the call; on a CPU above what was resident
    cores: float | None = None  # kept busy on average, in workers too; where items are delivered
    mAP: float | None = None  # of the features that the call is about; of whole tools only
    p95_ms: float | None = None  # 95 % quantile, of P95_CALLS or more


def measure(case: Case, settings: Settings, seconds: float) -> tuple[Work, list[Measurement]]:
    """Measure all providers of a case for about so many seconds together, after their results have been compared."""
    torch.manual_seed(1111)
    gpu = settings.device.type == "cuda"
    # A backward pass runs where its forward pass ran, and no graph can be captured on the default stream.
    with torch.cuda.stream(torch.cuda.Stream()) if gpu else nullcontext(), case.setup() as work:
        work = check(case.name, work)
        peaks = {name: peak_gib(call, settings.device) for name, call in work.providers.items()}
        replays = _replays(work) if gpu else {}
        calls = {**work.providers, **replays}
        cold, warm = clock(settings.device), clock(settings.device, flush=False)
        times: dict[str, list[float]] = {name: [cold(call)] for name, call in calls.items()}
        warm_times: dict[str, list[float]] = {name: [] for name in calls}
        rounds = round(seconds / (1e-3 * sum(first for (first,) in times.values())))
        rounds = 2 if settings.size == "quick" else min(max(rounds, work.fewest_rounds), MOST_ROUNDS)
        names, busy_s = list(calls), dict.fromkeys(calls, 0.0)
        for _ in range(rounds - 1):
            names.append(names.pop(0))  # nobody always follows the same one
            for name in names:
                others_s, own_s = _workers_cpu_s() if work.items else 0, process_time()
                times[name].append(cold(calls[name]))
                busy_s[name] += process_time() - own_s + ((_workers_cpu_s() if work.items else 0) - others_s)
                if name in replays:
                    warm_times[name].append(warm(calls[name]))
    measured = [_measurement(name, times[name], warm_times[name], peaks[name]) for name in work.providers]
    if work.items:
        measured = [replace(m, cores=busy_s[m.provider] / (1e-3 * sum(times[m.provider][1:]))) for m in measured]
    return work, measured


def check(case: str, work: Work) -> Work:
    """Check every result against the first one's: same shapes, all finite, equal within the tolerance.

    An alternative that cannot run here, for want of memory or of a kernel, is named and left out.
    """
    first, *others = work.providers
    expected, able = _result(work, first), {first: work.providers[first]}
    for i, value in enumerate(expected):
        if not value.isfinite().all():
            raise WrongResultError(f"{case}: result {i} of {first} is not finite")
    for name in others:
        try:
            result = _result(work, name)
        except RuntimeError as reason:
            line, *_ = str(reason).splitlines() or [""]
            print(f"{case}: {name} is left out: {type(reason).__name__}: {line}", file=sys.stderr)
            continue
        if [t.shape for t in result] != [t.shape for t in expected]:
            shapes = [[tuple(t.shape) for t in tensors] for tensors in (expected, result)]
            raise WrongResultError(f"{case}: {first} gives {shapes[0]}, {name} gives {shapes[1]}")
        for i, (got, value) in enumerate(zip(result, expected)):
            error = ((got - value).abs().max() / value.abs().max().clamp_min(1e-30)).item()
            if not error <= work.tolerance:
                raise WrongResultError(
                    f"{case}: result {i} of {name} differs from that of {first} by {error:.1e} of the largest value, "
                    f"{work.tolerance:.0e} is allowed: one of them is wrong, so neither is timed"
                )
        able[name] = work.providers[name]
    if len(able) == 1:
        raise WrongResultError(f"{case}: nothing that {first} could be compared with runs here")
    return replace(work, providers=able)


def _result(work: Work, name: str) -> list[Tensor]:
    return [t.detach().double() for t in work.compared(work.providers[name]())]


def _measurement(name: str, times: list[float], warm: list[float], peak_gib: float | None) -> Measurement:
    fast, *_, slow = quantiles(times, n=5, method="inclusive")
    p95 = quantiles(times, n=20, method="inclusive")[-1] if len(times) >= P95_CALLS else None
    warm_ms = median(warm) if warm else None
    return Measurement(name, len(times), median(times), fast, slow, warm_ms, peak_gib, p95_ms=p95)


def clock(device: torch.device, *, flush: bool = True) -> Callable[[Callable[[], object]], float]:
    """Make a function that tells how many ms a call takes; on a GPU `flush` empties the L2 first."""
    if device.type != "cuda":
        return _cpu_clock
    if flush:
        occupy: Callable[[], object] = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_
    else:
        occupy = partial(torch.cuda._sleep, SPIN_CYCLES)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def gpu_clock(call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        occupy()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return gpu_clock


def _cpu_clock(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return 1e3 * (perf_counter() - start)


def _workers_cpu_s() -> float:
    """Spent so far by the others of this process group, in steps of 10 ms."""
    group, ticks = os.getpgrp(), 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):  # ended meanwhile
            fields = file.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[2]) == group and int(file.parent.name) != os.getpid():
                ticks += int(fields[11]) + int(fields[12])  # user, system
    return ticks / os.sysconf("SC_CLK_TCK")


def _replays(work: Work) -> dict[str, Callable[[], object]]:
    """Calls as CUDA graphs, so that no launch is waited for. A call that itself waits for the device stays as it is.

    Which one waits is found out before: a capture that fails leaves torch's generator and allocator as if in it.
    """
    pool, replays = torch.cuda.graph_pool_handle(), {}  # one memory for all: no two replays at once
    for name, call in work.providers.items():
        if work.on_host or _waits(call):
            continue
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool, stream, "thread_local"):  # other threads may pin memory meanwhile
            call()
        replays[name] = graph.replay
    return replays


def _waits(call: Callable[[], object]) -> bool:
    """Whether the host waits for the device in it; if not, it has been warmed up."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
