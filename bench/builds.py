"""What Triton's compiler makes of the kernels that a call launches, for GPUs that need not be there.

The call runs on CPU tensors; every launch is compiled with the arguments and settings it would have, and not run. So
the table shows what ships: registers, stack and local memory (where spills go), shared memory, matrix instructions.
`python bench/builds.py attention` prints one JSON line per suite's launch, kernel and GPU.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fusionreid.kernels import _path

CAPABILITIES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Of one multiprocessor: 32-bit registers, warps, bytes of shared memory for all programs and for one (CUDA C++
# Programming Guide, technical specifications per compute capability; each program also takes 1 KiB).
REGISTERS, WARPS = 65_536, 64
SHARED_BYTES = {80: (167_936, 166_912), 90: (233_472, 232_448), 100: (233_472, 232_448)}
MATRIX_INSTRUCTION = re.compile(r"\b(HGMMA|IGMMA|UTCHMMA|UTCQMMA|UTC[A-Z]*MMA|HMMA|IMMA|QGMMA)\b")
PRODUCT = re.compile(r"\btt\.dot .*(tf32|: tensor<\w+x(b?f16|i8)>)")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Launch:
    """A call that launches kernels on CPU tensors, whose first dimension may be smaller than the real one."""

    name: str
    call: Callable[[], object]
    bytes_moved: float  # at the real size: every input read once, every output written once
    operations: float


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
    matrix_instructions: tuple[str, ...]
    has_product: bool  # one that matrix instructions exist for

    @property
    def programs(self) -> int:
        """How many of them fit a multiprocessor at once."""
        registers = 32 * self.warps * -(-self.registers // 8) * 8
        shared, _ = SHARED_BYTES[self.capability]
        return min(REGISTERS // registers, WARPS // self.warps, 32, shared // (self.shared_bytes + 1024))

    @property
    def fits(self) -> bool:
        return self.programs > 0 and self.shared_bytes <= SHARED_BYTES[self.capability][1]


def builds(call: Callable[[], object], capability: int) -> list[Build]:
    """All launches of a call on CPU tensors, compiled for a capability (90 is sm_90), each kernel and setting once."""
    compiled: dict[str, Any] = {}
    with _compiling(compiled, capability):
        call()
    return [_inspect(kernel, capability) for kernel in compiled.values()]


@contextmanager
def _compiling(compiled: dict[str, Any], capability: int) -> Iterator[None]:
    """Every launch of a Triton kernel is compiled and left in `compiled`, by the digest of its code."""
    if not issubclass(type(_probe), JITFunction):
        raise RuntimeError("the build report needs Triton's compiler: unset TRITON_INTERPRET")
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(kernel.hash, kernel)
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


def _inspect(kernel: Any, capability: int) -> Build:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    found = USAGE.search(usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage}")
    registers, stack, local = map(int, found.groups())
    meta, instructions = kernel.metadata, tuple(sorted(set(MATRIX_INSTRUCTION.findall(code))))
    has_product = bool(PRODUCT.search(kernel.asm["ttir"]))
    return Build(meta.name, capability, meta.num_warps, registers, stack, local, meta.shared, instructions, has_product)


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", *arguments], capture_output=True, text=True, check=True).stdout


def report(suite: str) -> list[dict[str, Any]]:
    """Every launch of a suite for every GPU."""
    launches = list(import_module(f"bench.suite_{suite}").launches())
    return [
        {"launch": launch.name, "bytes": launch.bytes_moved, "operations": launch.operations, **asdict(build),
         "programs": build.programs, "fits": build.fits}
        for launch in launches for capability in CAPABILITIES for build in builds(launch.call, capability)
    ]  # fmt: skip


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for row in report(name):
            print(json.dumps(row))
