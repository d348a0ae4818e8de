"""What several processes decide or wait for together; each test starts them with gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusionreid.engine.distributed import parallel
from tests import ROOT

START = (
    "import torch; from fusionreid.engine.distributed import parallel, peers; "
    "from fusionreid.engine.distributed.agreement import decide; "
)
BEGIN = "ranks = parallel.start('cpu'); rank = ranks.rank; "


def run_on(processes: int, code: str, set_up: str = "") -> list[str]:
    """What each process prints; `set_up` comes before the start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = []
    for rank in range(processes):
        environment = {**base, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}
        script = f"{START}{set_up}\n{BEGIN}{code}\nparallel.finish()"
        runs.append(subprocess.Popen([sys.executable, "-c", script], env=environment, cwd=ROOT, text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
    results = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0] * processes, results
    assert not any("Error" in errors for _, errors in results), results
    return [output + "".join(f"{line}\n" for line in errors.splitlines() if "waiting for" in line)
            for output, errors in results]  # fmt: skip


@pytest.mark.parametrize("how", ["ranks.first(work)", "decide(work, ranks)"])
def test_work_of_one_process_may_take_longer_than_a_collective(how: str, tmp_path: Path) -> None:
    """As the first index of a large data set does. `first` repeats it on the others, `decide` hands on the result."""
    set_up = "from datetime import timedelta; parallel.TIMEOUT = timedelta(seconds=3); peers.NEWS_S = 2"
    work = f"import time; time.sleep(8 * (rank == 0)); open({str(tmp_path)!r} + f'/{{rank}}', 'w').close(); return rank"
    outputs = run_on(2, f"\ndef work():\n    {work}\nprint({how})", set_up=set_up)
    assert outputs[0].split() == ["0"]
    first, *rest = outputs[1].splitlines()
    assert first == ("1" if "first" in how else "0")
    assert any("waiting for 1 of 2 processes" in line for line in rest)
    assert len(list(tmp_path.iterdir())) == (2 if "first" in how else 1)


def test_rows_of_all_processes_are_gathered_whatever_their_numbers() -> None:
    code = (
        "print([parallel.gather_rows(torch.arange(2.0 * n).view(n, 2) + 10 * rank).tolist() "
        "for n in (2, rank, 3 * rank, 0)])"
    )
    one, two = run_on(2, code)
    both = [[0.0, 1.0], [2.0, 3.0], [10.0, 11.0], [12.0, 13.0]]
    assert one == two == f"{[both, [[10.0, 11.0]], [[10.0, 11.0], [12.0, 13.0], [14.0, 15.0]], []]}\n"


def test_features_go_to_the_gpu_of_every_process_or_of_none() -> None:
    """Where one decides for its GPU and another against it, one gathers by NCCL, the other by gloo, for ever."""
    set_up = "torch.cuda.mem_get_info = lambda _: (100 if rank else 1000, 1000)"
    code = (
        "import dataclasses; gpu = dataclasses.replace(ranks, device=torch.device('cuda', 0)); "
        "torch.cuda.memory_reserved = torch.cuda.memory_allocated = lambda _: 0; "
        "print([parallel.fits_on_device(size, gpu) for size in (50, 500, 5000)], parallel.fits_on_device(1, ranks))"
    )
    assert set(run_on(2, code, set_up=set_up)) == {"[True, False, False] False\n"}


def test_what_torch_holds_ready_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (10, 100))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 70)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 30)
    assert parallel.free_memory(torch.device("cuda")) == 50


def test_weights_are_sharded_within_a_host_and_copied_between_hosts() -> None:
    cases = {  # processes on the host of each rank, PARALLEL.SHARD: shape of the mesh
        ("2222", 0): (2, 2), ("4444", 0): (4,), ("1111", 0): (4, 1), ("1333", 0): (4,), ("3331", 0): (4,),
        ("2222", 4): (4,), ("4444", 1): (4, 1), ("4444", 2): (2, 2),
    }  # fmt: skip
    code = f"""
import os
for sizes, share in {list(cases)}:
    os.environ["LOCAL_WORLD_SIZE"] = sizes[rank]
    print(tuple(parallel._mesh(ranks, share).shape))
"""
    assert run_on(4, code) == ["".join(f"{shape}\n" for shape in cases.values())] * 4


def test_one_process_leaves_no_process_group_behind() -> None:
    parallel.start("cpu")
    parallel.finish()
    assert not torch.distributed.is_initialized()


def test_the_first_text_of_any_process_is_told_on_all() -> None:
    code = (
        "from fusionreid.engine.distributed.agreement import first_of_ranks; "
        "print(first_of_ranks(['a', 'b'] * rank, ranks), first_of_ranks([], ranks) == '')"
    )
    assert run_on(2, code) == ["a, on process 1 True\n"] * 2
