"""Our providers under pytest-benchmark, to compare commits: `pytest bench --benchmark-only --benchmark-compare`.

Small shapes on a CPU, so that all cases take less than three minutes; `bench/run.py` has the sizes of real training.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from bench.run import SUITES
from bench.timing import Case, Settings, check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = Settings("default" if DEVICE.type == "cuda" else "quick", DEVICE)
CASES = [
    pytest.param(case, id=f"{suite}: {case.name}, {case.shape}")
    for suite in SUITES
    for case in import_module(f"bench.suite_{suite}").cases(SETTINGS)
]


@pytest.mark.parametrize("case", CASES)
def test_speed(case: Case, benchmark: Callable[[Callable[[], Any]], Any]) -> None:
    torch.manual_seed(1111)
    with case.setup() as work:
        check(case.name, work)

        def call() -> None:
            work.providers["ours"]()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark(call)
