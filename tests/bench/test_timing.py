from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench import timing
from bench.peak_memory import peak_gib
from bench.timing import Case, Settings, Work, WrongResultError, check, measure

QUICK = Settings("quick", torch.device("cpu"))


def case_of(*results: Tensor, tolerance: float = 1e-5) -> Case:
    """A provider per result, the first one ours."""

    @contextmanager
    def setup() -> Iterator[Work]:
        names = ["ours", *(f"other {i}" for i in range(1, len(results)))]
        yield Work({name: lambda value=value: (value,) for name, value in zip(names, results)}, tolerance)

    return Case("made up", "N 3", setup)


@pytest.mark.parametrize(
    ("results", "what"),
    [
        ((torch.ones(3), torch.tensor([1, 1, 1.01])), "result 0 of other 1 differs from that of ours by 1.0e-02"),
        ((torch.ones(3), torch.ones(3), torch.tensor([1, 1, torch.nan])), "of other 2 differs"),
        ((torch.tensor([torch.nan]), torch.tensor([torch.nan])), "result 0 of ours is not finite"),
        ((torch.ones(3), torch.ones(1, 3)), "other 1 gives"),
    ],
)
def test_a_wrong_provider_is_never_timed(results: tuple[Tensor, ...], what: str) -> None:
    with pytest.raises(WrongResultError, match=what):
        measure(case_of(*results), QUICK, 1)


def test_rounding_is_no_fault() -> None:
    with case_of(torch.ones(3), torch.ones(3) + 1e-6).setup() as work:
        check("made up", work)


def test_an_alternative_that_cannot_run_is_named_and_left_out(capsys: pytest.CaptureFixture) -> None:
    def too_large() -> tuple[Tensor]:
        raise torch.OutOfMemoryError("tried to allocate 64 GiB")

    same = {"ours": lambda: (torch.ones(3),), "large": too_large}
    with pytest.raises(WrongResultError, match="nothing that ours could be compared with"):
        check("made up", Work(same, 0, compared=list))
    work = check("made up", Work({**same, "other": same["ours"]}, 0, compared=list))
    assert list(work.providers) == ["ours", "other"]
    assert "made up: large is left out: OutOfMemoryError: tried to allocate 64 GiB" in capsys.readouterr().err


class Recorder:
    """Stands for torch.cuda, as far as the clock and the graphs ask it; writes down what is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.mode = "default"
        event = SimpleNamespace(
            record=lambda: self.said.append("event"), synchronize=lambda: None, elapsed_time=lambda _: 1.0
        )
        for name, value in {
            "synchronize": lambda: None,
            "Event": lambda **_: event,
            "_sleep": lambda _: self.said.append("busy"),
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "graph_pool_handle": lambda: "pool",
            "current_stream": lambda: "side stream",
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.said.append("replay")),
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def graph(self, _: object, pool: str, stream: str, mode: str) -> Iterator[None]:
        self.said.append(f"capture in {pool} on {stream}")
        yield


def test_a_warm_call_waits_for_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is busy while the host enqueues: else the time between the events is that of the launch."""
    cuda = Recorder(monkeypatch)
    timing.clock(torch.device("cuda"), flush=False)(lambda: cuda.said.append("call"))
    assert cuda.said == ["busy", "event", "call", "event"]


def test_no_call_that_waits_for_the_device_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that fails leaves the generator and the allocator of torch as if in it, for all cases to come."""
    cuda = Recorder(monkeypatch)

    def waits() -> None:
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def breaks() -> None:
        raise RuntimeError("illegal memory access")

    providers = {"ours": lambda: cuda.said.append("call"), "waits": waits}
    replays = timing._replays(Work(providers, 0))
    assert list(replays) == ["ours"]
    assert cuda.said == ["call"] * 3 + ["capture in pool on side stream", "call"]
    assert cuda.mode == "default"
    assert timing._replays(Work(providers, 0, on_host=True)) == {}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        timing._replays(Work({"ours": breaks}, 0))


def test_every_provider_is_called_equally_often_and_in_turn() -> None:
    calls: list[str] = []

    @contextmanager
    def setup() -> Iterator[Work]:
        def provider(name: str) -> Callable[[], tuple[Tensor]]:
            return lambda: calls.append(name) or (torch.ones(1),)

        yield Work({name: provider(name) for name in "abc"}, 0)

    _, measured = measure(Case("turns", "", setup), Settings("default", torch.device("cpu")), 0)
    assert [m.rounds for m in measured] == [5, 5, 5]
    assert "".join(calls) == "abc" + "abc" + "abc" + "bca" + "cab" + "abc" + "bca"  # check, memory, then five rounds


def test_memory_beyond_the_inputs_is_seen_on_a_cpu_too() -> None:
    call = partial(torch.ones, 2**26)
    assert peak_gib(call, torch.device("cpu")) == pytest.approx(0.25, abs=0.02)
