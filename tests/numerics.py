"""How numbers are compared: against fp64, relative to the largest magnitude, or to plain torch's own error."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


def assert_close(name: str, out: Any, expected: Any, relative: float) -> None:
    """The largest error is at most `relative` times the largest expected magnitude."""
    out, expected = (torch.as_tensor(t, dtype=torch.float64).detach().cpu() for t in (out, expected))
    assert out.shape == expected.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(out).all(), f"{name}: not finite"
    error, largest = (out - expected).abs().max().item(), expected.abs().max().item()
    assert error <= relative * max(largest, 1e-12), f"{name}: error {error:.2e}, largest value {largest:.2e}"


def assert_as_accurate(name: str, out: Tensor, low: Tensor, gold: Tensor) -> None:
    """Error against fp64 is at most twice that of plain torch in the same dtype, plus two ulp."""
    err, base = ((t.double() - gold).abs().max().item() for t in (out, low))
    ulp = torch.finfo(out.dtype).eps * gold.abs().max().item()
    assert err <= 2 * base + 2 * ulp, f"{name}: error {err:.2e}, plain torch {base:.2e}, ulp {ulp:.2e}"


def normal(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 values that follow from a text alone."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(text.encode())))
    return rng.standard_normal(shape, dtype=np.float32)


def entry_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The made-up value of a state entry with a published name (rule in tests/fixtures/README.md), float32."""
    last, draw = name.rsplit(".", 1)[-1], normal(name, shape)
    f32 = np.float32
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if last in ("running_mean", "bias"):
        return f32(0.05) * draw
    if last == "running_var":
        return f32(1) + f32(0.1) * np.abs(draw)
    if last == "p":
        return f32(3) + f32(0.1) * draw
    if last in ("pos_embed", "cls_token", "sie_embed"):
        return f32(0.02) * draw
    if last == "weight" and len(shape) == 1:
        return f32(0.25) + f32(0.05) * draw if shape == (1,) else f32(1) + f32(0.1) * draw
    return draw * f32(1 / np.sqrt(np.prod(shape[1:])))


def load_case(path: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The json and the arrays of one recorded case, e.g. "modules/seu"."""
    with np.load(FIXTURES / f"{path}.npz") as arrays:
        return json.loads((FIXTURES / f"{path}.json").read_text()), dict(arrays)
