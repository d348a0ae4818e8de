"""SOLVER.PRECISION fp32 is IEEE fp32, and PARALLEL.DETERMINISTIC asks everything that may vary not to."""

import os
from collections.abc import Iterator

import pytest
import torch

from fusionreid.engine.config import load_config
from fusionreid.engine.distributed import numerics, parallel
from fusionreid.engine.distributed.numerics import describe_numerics, set_numerics
from fusionreid.engine.training import trainer
from tests.runs import arguments


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cudnn, inductor = torch.backends.cudnn, torch._inductor.config
    before = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, inductor.deterministic
    fill = torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, inductor.deterministic = before
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize(("precision", "convolutions"), [("fp32", "ieee"), ("bf16", "tf32"), ("fp16", "tf32")])
def test_fp32_is_ieee_and_the_description_says_which(precision: str, convolutions: str) -> None:
    torch.use_deterministic_algorithms(False)
    set_numerics(precision, deterministic=False)
    assert describe_numerics() == {
        "fp32_convolutions": convolutions, "fp32_products": "ieee", "deterministic": False
    }  # fmt: skip
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the older switches still agree with the newer
        assert describe_numerics()["fp32_convolutions"] == "ieee"


def test_deterministic_turns_off_every_choice_that_may_vary() -> None:
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    set_numerics("bf16", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)
    assert torch._inductor.config.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert describe_numerics()["deterministic"]


def test_a_training_sets_them_after_its_device_and_before_its_model(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(parallel, "start", lambda *_, **__: done.append("device"))
    monkeypatch.setattr(trainer, "set_numerics", lambda *given, **more: done.append((given, more)))
    monkeypatch.setattr(trainer.Trainer, "_open_output", lambda *_: 1 / 0)
    _, path, *overrides = arguments(tmp_path, tmp_path, PARALLEL__DETERMINISTIC="yes", SOLVER__PRECISION="fp16")
    with pytest.raises(ZeroDivisionError):
        trainer.Trainer(load_config(path, overrides))
    assert done == ["device", (("fp16",), {"deterministic": True})]
    assert numerics.describe_numerics()
