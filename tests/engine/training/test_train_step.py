"""The training step: chunks, the moving average, what a CUDA graph needs of it, and what it may not do."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import load_config
from fusionreid.engine.distributed import parallel
from fusionreid.engine.training.optim import Optimizer
from fusionreid.engine.training.train_step import ChunkError, TrainStep, loss_options, pack, unpack
from fusionreid.model import Outputs
from tests.numerics import assert_close
from tests.ranks import IMAGES, PERSONS, batch, config

ALL = slice(None)
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select"}  # for the device


def make(dtype: torch.dtype = torch.float64, **solver: object) -> TrainStep:
    cfg, ranks = config(SOLVER=solver), parallel.start("cpu")
    torch.manual_seed(5)
    model = parallel.shard(build(cfg, PERSONS, 2).to(dtype), ranks)
    model.train()
    return TrainStep(model, Optimizer(model, cfg.SOLVER, ranks.device), cfg, ranks)


def state(step: TrainStep) -> dict[str, Tensor]:
    entries = {name: parallel.local_shard(t).detach() for name, t in step.model.state_dict().items()}
    return entries | step.optimizer.state() | {"sums": step._sums, "bad_step": step.bad_step}


def assert_same(ours: TrainStep, theirs: TrainStep, relative: float) -> None:
    for (name, a), b in zip(state(ours).items(), state(theirs).values(), strict=True):
        error = (a - b).abs().max().item()
        assert error <= relative * max(b.abs().max().item(), 1e-2), f"{name}: {error:.2e}"


def norms(step: TrainStep) -> Iterator[nn.Module]:
    return (module for module in step.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


@pytest.mark.parametrize("chunks", [2, 8])
def test_chunks_do_what_the_whole_batch_does(chunks: int) -> None:
    whole, cut = make(), make(ACCUMULATE=chunks)
    for step in (whole, cut):
        for norm in norms(step):
            norm.eval()
        for number in range(2):
            step(batch(number, ALL, torch.float64), number)
    assert_same(cut, whole, 1e-9)


def test_chunks_are_normalised_by_their_own_statistics_each_once() -> None:
    cut, plain = make(ACCUMULATE=2), make()

    def forward(images: Tensor, cameras: Tensor, _: int) -> Outputs:
        """Both chunks with their graphs, one after the other."""
        parts = []
        for chunk in (slice(0, IMAGES // 2), slice(IMAGES // 2, IMAGES)):
            plain.draws.show(chunk)
            parts.append(plain.model(images[chunk], cameras[chunk]))
        return unpack(torch.cat([pack(part) for part in parts]), parts[0])

    plain._forward = forward
    for step in (cut, plain):
        step(batch(0, ALL, torch.float64), 0)
    assert_same(cut, plain, 1e-9)


def test_a_chunk_without_two_images_is_refused() -> None:
    for chunks in (3, 16):
        with pytest.raises(ChunkError, match=f"16 images of a process into chunks of 2 or more, got {chunks}"):
            make(ACCUMULATE=chunks)


def test_the_average_follows_and_training_does_not_notice() -> None:
    step, plain = make(EMA=0.75), make()
    expected = {name: t.clone() for name, t in step.ema.state().items()}
    for number in range(3):
        for each in (step, plain):
            each(batch(number, ALL, torch.float64), number)
        weights = {name: parallel.full_tensor(t) for name, t in step.model.state_dict().items()}
        expected = {name: 0.75 * t + 0.25 * weights[name] for name, t in expected.items()}
        with step.ema.applied(), torch.no_grad():
            step.model.eval()(batch(9, ALL, torch.float64).images[:2], torch.zeros(2, dtype=torch.int64))
        parallel.reshard(step.model.train())
        with step.ema.applied():
            shown = {name: parallel.full_tensor(t).clone() for name, t in step.model.state_dict().items()}
        for name, t in expected.items():
            assert_close(name, shown[name], t, 1e-12)
    fresh = make(EMA=0.75)
    fresh.ema.load(step.ema.state())
    for name, t in fresh.ema.state().items():
        assert torch.equal(t, step.ema.state()[name])
    assert_same(step, plain, 0.0)


class Watch(TorchDispatchMode):
    """Notes every operator whose result the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.__name__.split(".")[0]
        if name in WAITS:
            self.waits.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("keys", [{}, {"OPTIMIZER_NAME": "AdamW", "EMA": 0.9, "MAX_GRAD_NORM": 1.0}])
def test_a_step_waits_for_nothing_and_keeps_its_tensors_in_place(keys: dict[str, object]) -> None:
    step = make(torch.float32, **keys)
    step(batch(0, ALL, torch.float32), 0)
    places = {name: t.data_ptr() for name, t in state(step).items()}
    with Watch() as watch:
        step(batch(1, ALL, torch.float32), 1)
    assert watch.waits == []
    assert places == {name: t.data_ptr() for name, t in state(step).items()}


def test_copied_inputs_replay_the_same_steps() -> None:
    """What a graph does: the same work on the same places, into which each batch is copied."""
    plain, static = make(torch.float32), make(torch.float32)
    own = batch(0, ALL, torch.float32)
    places = [t.clone() for t in (own.images, own.persons, own.cameras)]
    for number, rate in enumerate((0.1, 0.01, 0.02)):
        given = batch(number, ALL, torch.float32)
        for step in (plain, static):
            for group in step.optimizer.torch.param_groups:
                group["lr"].fill_(rate)
        plain(given, number)
        for place, t in zip(places, (given.images, given.persons, given.cameras)):
            place.copy_(t)
        static.number.fill_(number)
        static.update(*places)
    assert_same(static, plain, 0.0)
    assert math.isfinite(plain.read().loss)


def test_a_wish_to_stop_and_a_bad_step_are_reported() -> None:
    step = make(torch.float32)
    step(batch(0, ALL, torch.float32), 0, stop=15)
    assert step.read().stop_wanted
    spoiled = batch(1, ALL, torch.float32)
    spoiled.images[3] = torch.nan
    before = {name: parallel.local_shard(t).clone() for name, t in step.model.named_parameters()}
    for number in (7, 8):
        step(spoiled, number)
        spoiled = batch(2, ALL, torch.float32)
    assert step.read().bad_step == 7
    assert all(torch.equal(parallel.local_shard(t), before[name]) for name, t in step.model.named_parameters())


@pytest.mark.parametrize(("kind", "unit"), [("triplet", False), ("unit_triplet", True)])
def test_the_kind_of_triplets_reaches_the_loss(kind: str, unit: bool) -> None:
    options = loss_options(load_config("synthetic/tiny", [f"MODEL.METRIC_LOSS_TYPE={kind}"]), None)
    assert (options["unit_features"], options["margin"]) == (unit, 0.3)
