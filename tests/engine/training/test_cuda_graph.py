"""A step as a CUDA graph: what is recorded and when, what refuses to be, and on a GPU that nobody can tell."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fusionreid.dataloading.loader import Batch
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.distributed import parallel
from fusionreid.engine.training.cuda_graph import WARM_UP, Graphed
from fusionreid.engine.training.optim import Optimizer
from fusionreid.engine.training.train_step import TrainStep, fits_graph
from tests.engine.training.test_train_step import ALL, assert_same
from tests.ranks import PERSONS, batch, config


class Record:
    """A stand-in for a CUDA graph: a launch while it is open is kept, and done whenever it is replayed."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []
        self.is_open = False

    @contextmanager
    def opened(self, *_: object, **__: object) -> Iterator[None]:
        self.is_open = True
        yield
        self.is_open = False

    def launch(self, kernel: Callable[[], None]) -> None:
        if self.is_open:
            self.launches.append(kernel)
        else:
            kernel()

    def replay(self) -> None:
        for kernel in self.launches:
            kernel()


def test_every_batch_is_worked_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    record, stream = Record(), SimpleNamespace(wait_stream=lambda _: None)
    for name, stand_in in {"CUDAGraph": lambda: record, "graph": record.opened, "Stream": lambda: stream,
                           "current_stream": lambda: stream, "stream": lambda _: nullcontext()}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    calls, seen = [], []

    def work(images: Tensor, persons: Tensor) -> None:
        calls.append(images.stride())
        record.launch(lambda: seen.append((images.clone(), persons.clone())))

    graphed = Graphed(work)
    batches = [batch(number, ALL, torch.float32) for number in range(WARM_UP + 3)]
    for number, given in enumerate(batches):
        graphed(given.images, given.persons + number)
        given.images.zero_()  # as the memory of a batch is written anew
    assert calls == [batches[0].images.stride()] * (WARM_UP + 1)
    assert len(record.launches) == 1
    for number, (images, persons) in enumerate(seen):
        assert torch.equal(images, batch(number, ALL, torch.float32).images)
        assert torch.equal(persons, batches[number].persons + number)
    assert len(seen) == len(batches)


@pytest.mark.parametrize("sections", [
    {"SOLVER": {"PRECISION": "fp16"}}, {"SOLVER": {"ACCUMULATE": 2}}, {"SOLVER": {"OPTIMIZER_IMPL": "apex"}},
    {"PARALLEL": {"CHECKPOINT": True}},
])  # fmt: skip
def test_a_step_that_is_not_the_same_every_time_is_not_recorded_and_a_note_says_so(sections: dict) -> None:
    one_gpu = SimpleNamespace(device=torch.device("cuda", 0), world_size=1)
    fits = config(PARALLEL={"GRAPH": True})
    assert fits_graph(fits, one_gpu)
    assert not any("GRAPH" in note for note in fits.notes)
    assert not fits_graph(fits, SimpleNamespace(device=torch.device("cuda", 0), world_size=2))
    assert not fits_graph(fits, SimpleNamespace(device=torch.device("cpu"), world_size=1))
    cfg = config(**sections | {"PARALLEL": sections.get("PARALLEL", {}) | {"GRAPH": True}})
    assert not fits_graph(cfg, one_gpu)
    assert any(note.startswith("PARALLEL.GRAPH: True has no effect") for note in cfg.notes)


def trained(graph: bool, compiled: str, precision: str) -> TrainStep:
    """Eight steps on the GPU; a graph is recorded at the fourth, an evaluation and a new rate follow the fifth."""
    cfg = config(
        MODEL={"DROP_OUT": 0.1, "DEVICE": "cuda"},
        SOLVER={"PRECISION": precision, "EMA": 0.9, "MAX_GRAD_NORM": 1.0, "MAX_EPOCHS": 10},
        PARALLEL={"GRAPH": graph, "COMPILE": compiled},
    )
    ranks = parallel.start("cuda")
    torch.manual_seed(5)
    model = parallel.shard(build(cfg, PERSONS, 2).to(ranks.device), ranks, cfg.PARALLEL)
    step = TrainStep(model.train(), Optimizer(model, cfg.SOLVER, ranks.device), cfg, ranks)
    step.optimizer.set_epoch(2)
    for number in range(8):
        given = Batch(*(t.to(ranks.device) for t in vars(batch(number, ALL, torch.float32)).values()))
        if number == 5:
            with step.ema.applied(), torch.no_grad():
                model.eval()(given.images[:2], given.cameras[:2])
            parallel.reshard(model.train())
            step.optimizer.set_epoch(8)
        step(given, number)
    return step


@pytest.mark.needs_gpu("a CPU has no CUDA graphs")
@pytest.mark.parametrize(("compiled", "precision"), [("off", "fp32"), ("off", "bf16"), ("blocks", "bf16")])
def test_a_replayed_step_is_the_step_bit_by_bit(compiled: str, precision: str) -> None:
    plain, again, graphed = (trained(graph, compiled, precision) for graph in (False, False, True))
    assert_same(again, plain, 0.0)  # else the next line says nothing about graphs
    assert graphed._work.calls == 8
    assert_same(graphed, plain, 0.0)
    assert all(map(torch.equal, graphed.ema.state().values(), plain.ema.state().values()))
    assert math.isfinite(plain.read().loss)
