"""Every launch of a kernel: on the device of its tensors, whichever is the current one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fusionreid.kernels import (
    augment,
    batch_hard_triplet,
    dual_cross_attention,
    dual_self_attention,
    nearest_neighbours,
    rank_counts,
    smoothed_cross_entropy,
    triplet,
)
from tests.kernels.test_class_attention import make_stream


def class_attention() -> Tensor:
    stream = make_stream(2, 5, 3, 4, 12, torch.float32)
    return dual_cross_attention(stream._replace(tokens=stream.tokens.requires_grad_()))


def features() -> list[Tensor]:
    return [torch.randn(4, 6, requires_grad=True)]


def augmented() -> Tensor:
    whole = torch.zeros(2, 4, dtype=torch.int64)
    images = torch.zeros(2, 8, 4, 3, dtype=torch.uint8)
    line = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return augment(images, whole[:, 0].bool(), whole[:, :2], whole, whole[:, 0], seed=0, epoch=0, **line)


def persons() -> Tensor:
    return torch.tensor([0, 0, 1, 1])


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize(
    ("op", "launches"),
    [
        (lambda: dual_self_attention(torch.randn(1, 5, 3, 1, 16).half().requires_grad_()).sum().backward(), 2),
        (lambda: class_attention().sum().backward(), 2),
        (lambda: batch_hard_triplet(features(), persons()).losses.sum().backward(), 2),
        (lambda: smoothed_cross_entropy(features(), persons()).sum().backward(), 2),
        (augmented, 1),
        (lambda: nearest_neighbours(torch.randn(3, 6), torch.randn(9, 6), 2), 6),
        (lambda: rank_counts(torch.randn(4, 6), torch.randn(4, 6), *[persons()] * 2, persons(), 1 - persons()), 6),
    ],
)
def test_is_on_the_device_of_its_tensors(
    op: Callable[[], object], launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, found = [], []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        entered.append(x.device)
        yield
        entered.pop()

    kernel = type(triplet.forward_kernel)
    run = kernel.run
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kernel, "run", lambda *given, **named: found.append(entered[-1:]) or run(*given, **named))
    op()
    assert found == [[torch.empty(0).device]] * launches
