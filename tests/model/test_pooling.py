"""GeM against the recorded numbers, its limits, and half precision."""

import torch

from fusionreid.pooling import GeM
from tests.recorded import check_case


def test_equals_the_recorded_numbers() -> None:
    gem = GeM()
    check_case("modules/gem", gem, lambda x: gem(x)[:, :, None, None])


def test_is_the_mean_at_one_and_nears_the_maximum() -> None:
    x = torch.rand(2, 3, 5, 7, dtype=torch.double) + 0.1
    torch.testing.assert_close(GeM(p=1.0).double()(x), x.mean((2, 3)))
    torch.testing.assert_close(GeM(p=300.0).double()(x), x.amax((2, 3)), rtol=0.02, atol=0)


def test_half_precision_does_not_underflow() -> None:
    x = torch.full((1, 2, 4, 4), -1.0, dtype=torch.float16, requires_grad=True)
    gem = GeM()
    pooled = gem(x)
    pooled.sum().backward()
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, torch.full((1, 2), 1e-6), rtol=1e-4, atol=0)
    assert x.grad.isfinite().all()
    assert gem.p.grad.isfinite().all()
