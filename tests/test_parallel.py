"""In which precision a step is computed on a CPU."""

import pytest
import torch

from engine import parallel


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_that_would_imitate_bf16_computes_in_fp32_and_says_so(
    has: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu, x = torch.device("cpu"), torch.ones(2, 2)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    parallel.cpu_has_bf16.cache_clear()
    types = []
    for precision in ("bf16", "bf16", "fp32", "fp16"):
        with parallel.autocast(precision, cpu):
            types.append((x @ x).dtype)
    parallel.cpu_has_bf16.cache_clear()
    bf16 = torch.bfloat16 if has and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    assert types == [bf16, bf16, torch.float32, torch.float16]
    said = [record.getMessage() for record in caplog.records]
    assert said == (["this CPU has no bf16 instructions: SOLVER.PRECISION bf16 computes in fp32 here"]
                    if bf16 is torch.float32 else [])  # fmt: skip
