"""What every test stands on: the interpreter without a GPU, seeds, determinism, the recorded numbers."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a network for weights
HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else a deterministic product is an error there
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when a kernel is first imported

import pytest  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

pytest_plugins = ["tests.promises"]
FIXTURES = Path(__file__).parent / "fixtures"


def _is_bf16(operand: Any) -> bool:
    return isinstance(operand, TensorHandle) and operand.dtype.scalar == tl.bfloat16


def _widened(operand: TensorHandle) -> TensorHandle:
    if not _is_bf16(operand):
        return operand
    return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _refuses_bf16(name: str) -> Callable[..., TensorHandle]:
    method = getattr(InterpreterBuilder, name)

    def checked(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        if any(map(_is_bf16, operands)) and operands[-1] is not np.where:
            raise TypeError("Triton's interpreter computes with the bits of bf16: convert to tl.float32 in the kernel")
        return method(self, *operands)

    return checked


def _teach_the_interpreter_bf16() -> None:
    """Make it round to bf16, as a GPU does, and multiply in float32; other arithmetic in bf16 is an error.

    It keeps bf16 as uint16, computes with these bits, and drops those of a float32 that do not fit.
    """
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def rounded(self: InterpreterBuilder, operand: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if (operand.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, operand, dtype)
        bits = torch.from_numpy(np.ascontiguousarray(operand.data)).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(bits, tl.bfloat16)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, _widened(a), _widened(b), *rest)
    InterpreterBuilder.cast_impl = rounded
    for name in ("unary_op", "binary_op", "ternary_op", "create_fma", "create_fabs"):
        setattr(InterpreterBuilder, name, _refuses_bf16(name))


if os.environ.get("TRITON_INTERPRET") == "1":
    _teach_the_interpreter_bf16()


SLOW = {  # modules that take long: they start first, so that no process is left with one at the end
    *("bench/test_builds", "bench/test_bench", "engine/distributed/test_hosts", "engine/distributed/test_global_batch"),
    *(
        "model/test_model",
        "engine/training/test_training",
        "kernels/test_triplet_kernels",
        "kernels/test_ranking_kernels",
    ),
    *("engine/distributed/test_peers", "engine/distributed/test_elastic", "engine/training/test_resume"),
    *(
        "engine/training/test_evaluation",
        "engine/evaluation/test_evaluation",
        "engine/test_command",
        "engine/test_exporter",
    ),
    *("kernels/test_class_attention", "kernels/test_class_attention_kernels", "kernels/test_neighbours_kernels"),
    *("engine/monitoring/test_memory", "engine/test_own_run", "engine/test_signals", "dataloading/test_decode_workers"),
    *("engine/checkpoints/test_retention", "model/test_weight_files", "project/test_packaging", "engine/test_doctor"),
    *("engine/distributed/test_processes", "engine/distributed/test_compile"),
    *("engine/reporting/test_attention_maps", "model/test_trajectory", "dataloading/test_dali"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "sweep" not in config.option.markexpr:
        items[:] = [item for item in items if item.get_closest_marker("sweep") is None]
    tests = Path(__file__).parent
    for item in items:
        marker = item.get_closest_marker("needs_gpu")
        if marker is not None and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {marker.args[0]}"))
        if item.path.is_relative_to(tests) and item.path.relative_to(tests).with_suffix("").as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """Seeded, and deterministic algorithms also fill `torch.empty` with NaN, so that an unwritten output shows."""
    torch.manual_seed(1111)
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    """Of all test processes together."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be synced any more."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors take the Triton path: on the GPU, or on the CPU through the interpreter."""
    monkeypatch.setattr("fusionreid.kernels._path.triton_on_cpu", not HAS_GPU)
    with torch.device("cuda" if HAS_GPU else "cpu"):
        yield
