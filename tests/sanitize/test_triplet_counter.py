"""The triplet's programs hand over by counters, an order that the sanitizer does not model: the PTX has to keep it."""

import re

import pytest
import torch

from bench.builds import compiled
from fusionreid.kernels import triplet

pytestmark = pytest.mark.sanitize
EVENT = re.compile(r"\b(bar\.sync|(?:ld|st)\.global|(?:atom|red)\.\S+)")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_all_threads_are_done_before_a_program_counts_and_know_the_count_before_they_go_on(capability: int) -> None:
    x, persons = [torch.zeros(128, 64)], torch.arange(128) // 4
    call = lambda: triplet._forward(x, persons, None)  # noqa: E731
    ((kernel, _),) = compiled(call, capability)
    events = EVENT.findall(kernel.asm["ptx"])
    counts = [i for i, event in enumerate(events) if event.startswith("atom") and ".add." in event]
    assert len(counts) == 2, "one of a block's tiles, one of a head's blocks"
    for at in counts:
        assert "acq_rel" in events[at]
        assert ".gpu." in events[at]
        assert [events[at - 1], events[at + 1]] == ["bar.sync"] * 2, events[at - 3 : at + 4]
