"""The kernels as they ship, compiled for GPUs that need not be there: no spills, tensor cores, and they fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import run
from fusionreid.kernels._path import TRITON
from tests import ROOT

# The settings are chosen with the compilers from Triton 3.8 on; older ones find a few registers less.
SPILL = 0 if TRITON >= (3, 8) else 32
WORKSTATION = 99 * 1024  # bytes of shared memory that a program has at most on 8.6, 8.9 and 12.0
# Of the kernels as they ship, for sm_90: programs of a multiprocessor at once, and microseconds predicted for an H200,
# None where a launch has several kernels. What gets better is written down here.
SHIPPED: dict[tuple[str, str], tuple[int, float | None]] = {
    ("self-attention, N 129, forward", "forward_kernel"): (3, 26.0),
    ("self-attention, N 129, backward", "backward_kernel"): (1, 54.4),
    ("self-attention, N 211, forward", "forward_kernel"): (2, 42.2),
    ("self-attention, N 211, backward", "backward_kernel"): (2, 156.4),
    ("self-attention, N 193, forward", "forward_kernel"): (2, 38.9),
    ("self-attention, N 193, backward", "backward_kernel"): (2, 149.8),
    ("class attention, N 128 and 210, bfloat16, forward", "forward_kernel"): (2, 18.2),
    ("class attention, N 128 and 210, bfloat16, backward", "backward_kernel"): (2, 36.5),
    ("class attention, N 192 and 310, bfloat16, forward", "forward_kernel"): (2, 25.7),
    ("class attention, N 192 and 310, bfloat16, backward", "backward_kernel"): (2, 51.5),
    ("class attention, N 128 and 210, float32, forward", "forward_kernel"): (1, 36.5),
    ("class attention, N 128 and 210, float32, backward", "backward_kernel"): (1, 71.8),
    ("class attention, N 192 and 310, float32, forward", "forward_kernel"): (1, 51.5),
    ("class attention, N 192 and 310, float32, backward", "backward_kernel"): (1, 101.8),
    ("triplet, N 128, float32, forward", "forward_kernel"): (1, 1.9),
    ("triplet, N 128, float32, backward", "backward_kernel"): (25, 2.0),
    ("triplet, N 128, mixed, forward", "forward_kernel"): (1, 1.8),
    ("triplet, N 128, mixed, backward", "backward_kernel"): (16, 2.3),
    ("triplet, N 4096, float32, forward", "split_kernel"): (12, None),
    ("triplet, N 4096, float32, forward", "forward_kernel"): (1, None),
    ("triplet, N 4096, float32, backward", "backward_kernel"): (32, 20.4),
    ("triplet, N 4096, bfloat16, forward", "split_kernel"): (12, None),
    ("triplet, N 4096, bfloat16, forward", "forward_kernel"): (1, None),
    ("triplet, N 4096, bfloat16, backward", "backward_kernel"): (32, 12.6),
    ("cross-entropy, K 751, float32, forward", "forward_kernel"): (9, 1.1),
    ("cross-entropy, K 751, float32, backward", "backward_kernel"): (12, 1.7),
    ("cross-entropy, K 1041, bfloat16, forward", "forward_kernel"): (4, 1.6),
    ("cross-entropy, K 1041, bfloat16, backward", "backward_kernel"): (6, 1.3),
    ("cross-entropy, K 100000, bfloat16, forward", "forward_kernel"): (3, 6.6),
    ("cross-entropy, K 100000, bfloat16, backward", "backward_kernel"): (4, 16.1),
    ("lengths", "lengths_kernel"): (8, 517.5),
    ("integers", "split_kernel"): (5, 904.7),
    ("counts of one span", "count_kernel"): (1, 8595.7),
    ("nearest of one span", "append_kernel"): (1, 6039.9),
    ("fp64 distance of a pair", "distances_kernel"): (4, 0.6),
    ("augmentation, B 128, 256 x 128, bfloat16", "_augment"): (6, 11.2),
    ("augmentation, B 128, 256 x 128, float32", "_augment"): (6, 17.0),
}
# Of other products the tiles are smaller than it needs: twelve heads of a class token, or a batch that is to use every
# multiprocessor.
HOPPERS_OWN = {"self-attention": "HGMMA", "triplet, N 4096": "HGMMA", "counts": "IGMMA", "nearest": "IGMMA"}


@pytest.mark.parametrize("suite", ["attention", "triplet", "evaluation", "loader"])
def test_kernels_compile_well(suite: str) -> None:
    rows = run.builds(suite)
    assert {row["capability"] for row in rows} == {80, 90, 100}
    for row in rows:
        where = f"{row['kernel']}, {row['launch']}, sm_{row['capability']}"
        spilled = row["stack_bytes"] + row["local_bytes"]
        assert spilled <= SPILL, f"{where}: registers spill, {spilled} bytes"
        assert row["fits"], f"{where}: {row['shared_bytes']} bytes of shared memory or {row['registers']} registers"
        if row["capability"] == 80 and not row["launch"].startswith("class attention"):
            assert row["shared_bytes"] <= WORKSTATION, f"{where}: the settings are those of smaller GPUs too"
        if row["capability"] == 90 and TRITON >= (3, 8):
            programs, microseconds = SHIPPED[row["launch"], row["kernel"]]
            assert row["programs"] >= programs, f"{where}: {row['programs']} programs at once, {programs} before"
            if microseconds is not None:
                predicted = 1e6 * row["predicted_s"]
                assert predicted <= 1.05 * microseconds, f"{where}: {predicted:.1f} us predicted, {microseconds} before"
        if row["has_product"]:
            assert row["matrix_instructions"], f"{where}: a product without tensor cores"
        own = [name for kind, name in HOPPERS_OWN.items() if row["launch"].startswith(kind)]
        if row["has_product"] and row["capability"] == 90:
            found = {name.split(".")[0] for name in row["matrix_instructions"]}
            assert set(own) <= found, f"{where}: a product without Hopper's own instruction"


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    """The same inspection finds the stack of a kernel that cannot hold what it loads."""
    source = """
import sys, torch, triton, triton.language as tl
from bench.builds import builds

@triton.jit
def hoard(x, y, SIZE: tl.constexpr):
    rows = tl.load(x + tl.arange(0, SIZE)[:, None] * 64 + tl.arange(0, 64)).to(tl.float32)
    for step in range(64):
        rows = tl.sqrt(rows) + tl.sum(rows) * step
    tl.store(y + tl.arange(0, SIZE)[:, None] * 64 + tl.arange(0, 64), rows)

x = torch.zeros(1024, 64)
(build,) = builds(lambda: hoard[(1,)](x, x, SIZE=1024, num_warps=4), 90)
print(build.stack_bytes)
"""
    assert int(printed(source, tmp_path)) > 0


def test_class_attention_fits_the_gpus_of_workstations(tmp_path: Path) -> None:
    source = """
import torch
from bench.builds import builds
from bench.suite_attention import class_launches

for dtype in (torch.bfloat16, torch.float32):
    for launch in class_launches(1, (128, 210), 12, 64, dtype):
        for build in builds(launch.call, 86):
            print(build.shared_bytes, build.stack_bytes + build.local_bytes)
"""
    lines = printed(source, tmp_path).splitlines()
    assert len(lines) == 4
    for shared, spilled in (map(int, line.split()) for line in lines):
        assert shared <= WORKSTATION
        assert spilled <= SPILL


def printed(source: str, tmp_path: Path) -> str:
    """By a process of its own, in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = tmp_path / "source.py"
    path.write_text(source)
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
