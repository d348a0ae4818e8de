"""Faults planted in small kernels: the sanitizer reports each one, and nothing in the kernel without a fault."""

import pytest
import torch
import triton
import triton.language as tl

sanitize = pytest.importorskip("ttsem.sanitize", reason="it is installed by `make sanitize`")
pytestmark = pytest.mark.sanitize


@triton.jit
def halve(
    x_ptr, y_ptr, total_ptr, N, STRIDE: tl.constexpr, MASKED: tl.constexpr, STEP: tl.constexpr, ATOMIC: tl.constexpr
):
    """y = -x / 2 by blocks of 8, and the number of programs."""
    at = tl.program_id(0) * STEP + tl.arange(0, 8)
    mask = (at < N) if MASKED else (at < N + 8)
    x = tl.load(x_ptr + at * STRIDE, mask=mask & (at * STRIDE < N), other=0.0)
    tl.store(y_ptr + at, -x * 0.5 + tl.program_id(0) * (STEP < 8), mask=mask)
    if ATOMIC:
        tl.atomic_add(total_ptr, 1)
    else:
        tl.store(total_ptr, tl.load(total_ptr) + 1)


def run(programs: int = 3, **changes: object) -> tuple[torch.Tensor, torch.Tensor, int]:
    x, total = torch.randn(19, dtype=torch.bfloat16), torch.zeros((), dtype=torch.int32)
    y = torch.empty_like(x)  # NaN
    settings = {"STRIDE": 1, "MASKED": True, "STEP": 8, "ATOMIC": True} | changes
    with sanitize.session(cuda_is_cpu=False):
        halve[(programs,)](x, y, total, len(x), **settings)
    return x, y, total.item()


def test_a_kernel_without_a_fault_is_right_in_bf16() -> None:
    x, y, programs = run()
    assert torch.equal(y, -x / 2)
    assert programs == 3


def test_a_missing_mask_writes_past_the_end() -> None:
    with pytest.raises(sanitize.KernelFault, match=r"writes 5 element\(s\) past the end of .* `y_ptr`"):
        run(MASKED=False)


def test_programs_that_overlap_race() -> None:
    with pytest.raises(sanitize.KernelFault, match="both touch element 4 of `y_ptr`"):
        run(STEP=4)


def test_a_sum_without_an_atomic_races() -> None:
    with pytest.raises(sanitize.KernelFault, match="both touch element 0 of `total_ptr`"):
        run(ATOMIC=False)


def test_rows_that_nobody_writes_are_nan() -> None:
    assert run(programs=2)[1].isnan().tolist() == [False] * 16 + [True] * 3


def test_a_wrong_stride_gives_other_values() -> None:
    x, y, _ = run(STRIDE=2)
    assert not torch.equal(y, -x / 2)
