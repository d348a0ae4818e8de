"""The local refinement unit against the recorded numbers."""

import pytest
import torch

from fusionreid.refinement import LRU
from tests.recorded import check_case


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_equals_the_recorded_numbers(mode: str) -> None:
    lru = LRU(12, 8)
    check_case("modules/lru", lru, lru, mode=mode)


def test_works_on_single_cells_alone() -> None:
    """No cell looks at its neighbours: shuffled cells give the shuffled answer."""
    lru, x = LRU(6, 4).eval(), torch.randn(2, 6, 3, 5)
    order = torch.randperm(15)
    shuffled = lru(x.flatten(2)[..., order].unflatten(2, (3, 5)))
    torch.testing.assert_close(shuffled.flatten(2), lru(x).flatten(2)[..., order])
