"""Predict the time of a launch from what the compiler made of it. A prediction, not a measurement.

    time = max(bytes / copy rate, operations / (peak * share)) + waves * (1 + waiting turns) * latency

Bytes and operations are those of an ideal implementation. `share` is what the tiles of the matrix instructions leave of
the peak: Hopper's take N / 2 clocks for 64 x N and read A and B from shared memory at 128 bytes per clock. The loads of
a program's start are hidden by nothing, nor are those of a loop that waits for copies it has just issued
(`async_wait {num = 0}`); the programs of a multiprocessor overlap. Not in the model: instruction issue, bank conflicts,
operations beyond the ideal's, loops whose number of turns the compiler does not know (counted as one turn).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

LATENCY_S = 0.6e-6  # of a load from device memory under load, an estimate


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU."""

    name: str
    multiprocessors: int
    bytes_per_s: float
    operations_per_s: float  # of bf16 products


# The H200's rates were measured in a copy and a large product; the others are published rates times the same shares.
GPUS = {
    80: Gpu("A100", 108, 1.8e12, 250e12),
    90: Gpu("H200", 132, 4.3e12, 790e12),
    100: Gpu("B200", 148, 7.2e12, 1800e12),
}
# Of the rate of bf16, by the type in the instruction's name; the old instructions reach some 60 % of Hopper's peak.
RATES = {"TF32": 0.5, "S8": 2.0, "INT8": 2.0, "IGMMA": 2.0, "IMMA": 2.0}
OLD_ON_HOPPER = 0.6
WITHOUT_TENSOR_CORES = 1 / 12  # fp32 products
TILE = re.compile(r"[HI]GMMA\.64x(\d+)x")
LOOP = re.compile(r"scf\.for %\S+ = %c(\d+)\S* to %c(\d+)\S* step %c(\d+)")
WAIT = re.compile(r"ttg\.async_wait .*\{num = (\d+)")


def tensor_share(instructions: Mapping[str, int], capability: int) -> float:
    """The share of bf16's peak that a mix of matrix instructions can reach; " RS": A comes from registers."""
    if not instructions:
        return WITHOUT_TENSOR_CORES
    least = most = 0.0
    for name, count in instructions.items():
        rate = next((rate for kind, rate in RATES.items() if kind in name), 1.0)
        tile = TILE.match(name)
        columns = int(tile[1]) if tile else 64
        clocks = columns / 2
        reads = (0 if name.endswith("RS") else 64 * 32 / 128) + columns * 32 / 128 if tile else 0
        least += count * columns
        most += count * columns * max(clocks, reads) / clocks / rate
        if capability == 90 and not tile:
            most += count * columns * (1 / OLD_ON_HOPPER - 1) / rate
    return least / most


def waiting_turns(ttgir: str) -> int:
    """Turns of loops that wait for the copies of the turn before, hence for their whole latency."""
    turns, found = 0, None
    for line in ttgir.splitlines():
        if "scf.for" in line:
            loop = LOOP.search(line)
            found = -(-(int(loop[2]) - int(loop[1])) // int(loop[3])) if loop else 1
        wait = WAIT.search(line)
        if wait and found is not None:  # the first of a loop; what is waited for behind it comes once
            turns, found = turns + (found if wait[1] == "0" else 0), None
    return turns


def wait_depth(ttgir: str) -> int | None:
    """Return how many copies are still under way at a wait, of the wait with the most; None without any."""
    waits = [int(number) for number in WAIT.findall(ttgir)]
    return max(waits, default=None)


def predicted_s(
    capability: int, bytes_moved: float, operations: float, share: float, programs: int, at_once: int, turns: int
) -> float:
    """Predict the time of a launch: its bytes or operations, and the latency of its waves of programs."""
    gpu = GPUS[capability]
    work = max(bytes_moved / gpu.bytes_per_s, operations / (gpu.operations_per_s * share))
    waves = math.ceil(programs / (gpu.multiprocessors * max(1, at_once)))
    return work + waves * (1 + turns) * LATENCY_S
