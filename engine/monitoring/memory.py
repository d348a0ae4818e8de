"""Memory of this process: what it holds, its peak, and what to try where there is too little. Loads without torch."""

import errno
import math
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fusionreid.engine.config import Config
from fusionreid.errors import ReIDError

SIGNS = ("MemoryError", "OutOfMemoryError", "out of memory", "not enough memory", "DefaultCPUAllocator",
         "STATUS_ALLOC_FAILED")  # fmt: skip
ASKED_FOR = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", re.IGNORECASE)
UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}
AFTER_A_STEP, WITHIN_THE_FIRST = 0.9, 0.5  # of what a linear estimate gives: the first step had yet more to ask for
Phase = Literal["training", "evaluation"]


class OutOfMemory(ReIDError, RuntimeError):
    """A training or an evaluation did not fit; the message names a batch that might."""

    exit_code = 6


def ran_out(error: BaseException) -> bool:
    """Whether this error is about memory, on a device or the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError | RuntimeError) and any(sign in repr(error) for sign in SIGNS)


def peak() -> int:
    """Bytes at most in use so far: the tensors of the GPU, or the whole process where there is none."""
    cuda = _cuda()
    if cuda is not None:
        return int(cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held() -> int:
    """Bytes in use now."""
    cuda = _cuda()
    if cuda is not None:
        return int(cuda.memory_allocated())
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak()


@contextmanager
def explained(phase: Phase, cfg: Config) -> Iterator[None]:
    """Context manager: running out of memory in here becomes `OutOfMemory` with the advice for this phase."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        explain(error, phase, cfg)
        raise


def explain(error: BaseException, phase: Phase, cfg: Config, loaded: int = 0, finished_steps: int = 0) -> None:
    """Raise `OutOfMemory` if this error is about memory; a training held `loaded` bytes before its first step.

    While a CUDA graph is recorded that error comes second: first comes the one about a record that was broken off.
    """
    for cause in (error, error.__context__):
        if cause is not None and ran_out(cause):
            text = advice(cause, cfg, phase, loaded, finished_steps)
            raise OutOfMemory(text + _snapshot(cause, Path(cfg.OUTPUT_DIR))) from error


def advice(
    error: BaseException, cfg: Config | None, phase: Phase | None = None, loaded: int = 0, finished_steps: int = 0
) -> str:
    """Name the peak, the batch, and one that fits by an estimate; of both phases if it is not known in which it was."""
    asked, reason = _asked_for(error), str(error).splitlines()[0] if str(error) else type(error).__name__
    if _cuda() is not None and _is_of_host(error):
        return f"out of host memory: try a lower DATALOADER.NUM_WORKERS or DATALOADER.CACHE none ({reason})"
    text = f"out of {'host' if _cuda() is None else 'GPU'} memory, peak {_gib(peak())}"
    text += f" when {_gib(asked)} more were asked for" if asked else ""
    if cfg is not None:
        if phase != "evaluation":
            needed = peak() + asked
            room = min(_room(), needed)  # what was asked for was not there
            fits = fitting_batch(cfg, loaded, needed, room, AFTER_A_STEP if finished_steps else WITHIN_THE_FIRST)
            text += f"; training with SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}: {_remedy(fits)}"
        if phase != "training":
            batch = cfg.TEST.IMS_PER_BATCH
            text += f"; evaluating with TEST.IMS_PER_BATCH {batch}: try {batch // 2 or 1}"
    return f"{text} ({reason})"


def fitting_batch(cfg: Config, loaded: int, needed: int, room: int, share: float) -> int | None:
    """A batch smaller than the configured one, of whole persons and chunks on every process; None: there is none.

    What is needed beyond `loaded` bytes is taken to be linear in the batch; `share` of the room for it is used. A
    peak that lags behind them tells nothing of the room: the share alone counts.
    """
    solver, processes = cfg.SOLVER, int(os.environ.get("WORLD_SIZE", "1"))
    unit = processes * math.lcm(cfg.DATALOADER.NUM_INSTANCE, solver.ACCUMULATE)
    least = max(2 * cfg.DATALOADER.NUM_INSTANCE, 2 * processes * solver.ACCUMULATE)
    grown = needed - loaded
    fits = share * (max(room - loaded, 0) / grown if grown > 0 else 1) * solver.IMS_PER_BATCH
    batch = min(int(fits), solver.IMS_PER_BATCH - 1) // unit * unit
    smallest = -(-least // unit) * unit
    if batch < smallest < solver.IMS_PER_BATCH:
        return smallest
    return batch if batch >= smallest else None


def _is_of_host(error: BaseException) -> bool:
    return isinstance(error, MemoryError | OSError) or "DefaultCPUAllocator" in str(error)


def _snapshot(error: BaseException, folder: Path) -> str:
    """Write what the GPU's memory holds, if it was that which ran out, and say where."""
    cuda, path = _cuda(), folder / f"gpu_memory-rank{os.environ.get('RANK', 0)}.pickle"
    if cuda is None or _is_of_host(error):
        return ""
    try:
        cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError) as error:
        return f"; no snapshot of the memory: {error}"
    return f"; what it held is in {path}: drop the file on https://docs.pytorch.org/memory_viz"


def _remedy(batch: int | None) -> str:
    if batch is None:
        return "it is the smallest: try PARALLEL.CHECKPOINT yes or a smaller INPUT.SIZE_TRAIN"
    keep = "or keep the batch with a higher SOLVER.ACCUMULATE or PARALLEL.CHECKPOINT yes"
    return f"try {batch}, by an estimate, {keep}"


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _room() -> int:
    """Bytes this process could have for itself."""
    cuda = _cuda()
    if cuda is not None:
        return int(cuda.mem_get_info()[0] + cuda.memory_reserved())
    from fusionreid.dataloading.cache import free_host_memory

    return held() + free_host_memory()


def _asked_for(error: BaseException) -> int:
    match = ASKED_FOR.search(str(error))
    return int(float(match[1]) * UNITS[match[2].lower()]) if match else 0


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
