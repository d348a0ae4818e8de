"""Prefetching: a side stream prepares a batch while a step still reads the one before."""

from collections.abc import Iterator

import pytest
import torch

from fusionreid.dataloading.loader import Batch, _prefetch

BATCHES, NUMBERS = 4, 1 << 22  # of an epoch; of a batch, 32 MiB


def numbered(device: torch.device) -> Iterator[Batch]:
    for number in range(BATCHES):
        numbers = torch.full((NUMBERS,), number, device=device)
        yield Batch(numbers, numbers, numbers, numbers)


@pytest.mark.needs_gpu("a CPU has no streams")
def test_a_batch_outlives_its_step_and_the_next_epoch_has_its_memory() -> None:
    device, read, reserved = torch.device("cuda", 0), [], []
    for _ in range(6):
        for batch in _prefetch(numbered(device), device):
            torch.cuda._sleep(20_000_000)  # cycles: the host prepares all other batches before this one is read
            read.append(batch.images.sum())
            del batch
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert torch.stack(read).tolist() == [number * NUMBERS for _ in range(6) for number in range(BATCHES)]
    assert reserved[-1] == reserved[1]
