"""Inspect what Triton's compiler makes of the kernels that a call launches, for GPUs that need not be there.

The call runs on CPU tensors; every launch is compiled with the arguments and settings it would have, and not run. So
the table shows what ships: registers, stack and local memory (where spills go), shared memory, matrix instructions, how
far copies run ahead, and a predicted time (`bench/predict.py` says of what).
`python bench/builds.py attention` prints one JSON line per suite's launch, kernel and GPU.
"""

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.predict import predicted_s, tensor_share, wait_depth, waiting_turns
from fusionreid.kernels import _path

CAPABILITIES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Of one multiprocessor: 32-bit registers, warps, bytes of shared memory for all programs and for one (CUDA C++
# Programming Guide, technical specifications per compute capability; each program also takes 1 KiB).
REGISTERS, WARPS = 65_536, 64
SHARED_BYTES = {80: (167_936, 166_912), 90: (233_472, 232_448), 100: (233_472, 232_448)}
MATRIX_INSTRUCTION = re.compile(r"\b((?:HGMMA|IGMMA|QGMMA|HMMA|IMMA|UTC[A-Z]*MMA)[.\w]*) (?:R\d+, (R\d+, gdesc)?)?")
PRODUCT = re.compile(r"\btt\.dot .*(tf32|: tensor<\w+x(b?f16|i8)>)")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Launch:
    """A call that launches kernels on CPU tensors, whose first dimension may be smaller than the real one."""

    name: str
    call: Callable[[], object]
    bytes_moved: float  # at the real size: every input read once, every output written once
    operations: float
    copies: int = 1  # times that the first dimension is larger at the real size


@dataclass(frozen=True)
class Build:
    """One kernel as compiled for one launch."""

    kernel: str
    capability: int
    warps: int
    registers: int  # per thread
    stack_bytes: int  # per thread
    local_bytes: int  # per thread
    shared_bytes: int  # per program
    matrix_instructions: dict[str, int]  # how many of each shape and type; RS: their first operand is in registers
    has_product: bool  # one that matrix instructions exist for
    grid: int  # programs of the launch
    wait_depth: int | None  # copies that are still under way at the wait with the most; None without any
    waiting_turns: int  # of loops that leave none under way

    @property
    def programs(self) -> int:
        """Number of programs that fit a multiprocessor at once."""
        registers = 32 * self.warps * -(-self.registers // 8) * 8
        shared, _ = SHARED_BYTES[self.capability]
        return min(REGISTERS // registers, WARPS // self.warps, 32, shared // (self.shared_bytes + 1024))

    @property
    def fits(self) -> bool:
        """Whether a multiprocessor has room for one."""
        return self.programs > 0 and self.shared_bytes <= SHARED_BYTES[self.capability][1]


def builds(call: Callable[[], object], capability: int) -> list[Build]:
    """Compile all launches of a call on CPU tensors for a capability (90 is sm_90), each kernel and setting once."""
    return [_inspect(kernel, grid, capability) for kernel, grid in compiled(call, capability)]


def compiled(call: Callable[[], object], capability: int) -> list[tuple[Any, int]]:
    """Return the kernels of all launches of a call, each with a setting once, and their numbers of programs."""
    kernels: dict[str, tuple[Any, int]] = {}
    with _compiling(kernels, capability):
        call()
    return list(kernels.values())


@contextmanager
def _compiling(kernels: dict[str, tuple[Any, int]], capability: int) -> Iterator[None]:
    """Every launch of a Triton kernel is compiled and left in `kernels`, by the digest of its code."""
    if not issubclass(type(_probe), JITFunction):
        raise RuntimeError("the build report needs Triton's compiler: unset TRITON_INTERPRET")
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.setdefault(kernel.hash, (kernel, prod(grid)))
        return kernel

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Target(capability))
    JITFunction.run, _path.triton_on_cpu = compile_only, True
    try:
        yield
    finally:
        JITFunction.run, _path.triton_on_cpu = run, False
        triton.runtime.driver._active = before


class _Target:
    """As much of a Triton driver as its compiler asks for. Each capability is a device with its own cache."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@triton.jit
def _probe() -> None:
    pass


def _inspect(kernel: Any, grid: int, capability: int) -> Build:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    found = USAGE.search(usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage}")
    registers, stack, local = map(int, found.groups())
    meta, ttgir = kernel.metadata, kernel.asm["ttgir"]
    instructions = Counter(name + " RS" * bool(of_registers) for name, of_registers in MATRIX_INSTRUCTION.findall(code))
    return Build(
        meta.name,
        capability,
        meta.num_warps,
        registers,
        stack,
        local,
        meta.shared,
        dict(sorted(instructions.items())),
        bool(PRODUCT.search(kernel.asm["ttir"])),
        grid,
        wait_depth(ttgir),
        waiting_turns(ttgir),
    )


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", *arguments], capture_output=True, text=True, check=True).stdout


def report(suite: str) -> list[dict[str, Any]]:
    """Compile every launch of a suite for every GPU, in two processes."""
    count = len(_jobs(suite))
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the locks of the compiler's threads
    with ProcessPoolExecutor(2, spawn) as pool:
        return [row for rows in pool.map(_rows, [suite] * count, range(count)) for row in rows]


@cache
def _jobs(suite: str) -> list[tuple[Launch, int]]:
    """A launch is a closure, which cannot be sent: every process makes its own."""
    launches = import_module(f"bench.suite_{suite}").launches()
    return [(launch, capability) for launch in launches for capability in CAPABILITIES]


def _rows(suite: str, number: int) -> list[dict[str, Any]]:
    launch, capability = _jobs(suite)[number]
    found = builds(launch.call, capability)
    return [
        {
            "launch": launch.name,
            "bytes": launch.bytes_moved,
            "operations": launch.operations,
            **asdict(build),
            "programs": build.programs,
            "fits": build.fits,
            "predicted_s": predicted_s(
                capability,
                launch.bytes_moved,
                launch.operations,
                tensor_share(build.matrix_instructions, capability),
                build.grid * launch.copies,
                build.programs,
                build.waiting_turns,
            )
            if len(found) == 1
            else None,
        }
        for build in found
    ]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for row in report(name):
            print(json.dumps(row))
