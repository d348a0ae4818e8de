"""On which device a process computes, and in which precision on a CPU."""

import socket

import pytest
import torch
from torch import nn

from fusionreid.engine.config import ParallelConfig
from fusionreid.engine.distributed import parallel


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


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(parallel.DeviceError, match=r"finds 4 GPUs here, for process 5 there is none: .*per-node 4"):
        parallel.start("cuda")


def test_half_of_what_a_launcher_sets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in parallel.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(parallel.DeviceError, match="WORLD_SIZE is set and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        parallel.start("cpu")


@pytest.mark.parametrize(("device", "layout"), [("cuda", torch.channels_last), ("cpu", torch.contiguous_format)])
def test_one_process_keeps_convolutions_as_its_device_likes_them(device: str, layout: torch.memory_format) -> None:
    ranks = parallel.Ranks(0, 1, torch.device(device), None)
    conv = parallel.shard(nn.Conv2d(8, 4, 3), ranks)
    assert conv.weight.is_contiguous(memory_format=layout)


def test_exact_by_default_means_above_one_process() -> None:
    one, two = (parallel.Ranks(0, count, torch.device("cpu"), None) for count in (1, 2))
    for value, expected in (("auto", [False, True]), (True, [False, True]), (False, [False, False])):
        assert [parallel.is_exact(ParallelConfig(EXACT=value), ranks) for ranks in (one, two)] == expected
    assert ParallelConfig().EXACT == "auto"


def test_an_address_that_another_program_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        place = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(parallel.dist, "is_initialized", lambda: False)  # whatever ran before in this process
        with pytest.raises(parallel.MeetingError, match=rf"cannot meet at 127\.0\.0\.1:{port}: .*MASTER_PORT") as error:
            parallel.start("cpu")
    assert error.value.exit_code == 2
