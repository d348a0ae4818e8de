"""A training step and an embedding as the engine does them, against the published code: whole, then part by part.

A part runs alone on the activations that the whole model gives it. On a GPU "of limit" is the MFU by the largest
product that this machine reaches, counting the operations of the published model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from bench.model_parts import PARTS, forward_and_backward, prepare
from bench.step_baselines import (
    as_published,
    plain_step,
    published_autocast,
    published_loss,
    published_optimizer,
    published_step,
)
from bench.suite_loader import GREY_LEVELS, FilesDataset, by_pillow, last, visible
from bench.timing import Case, Settings, Work
from fusionreid import FusionReID
from fusionreid.dataloading.loader import Batch
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel
from fusionreid.engine.distributed.compile import compile_parts
from fusionreid.engine.monitoring.mfu import GFLOP_PER_IMAGE
from fusionreid.engine.training.optim import Optimizer
from fusionreid.engine.training.trainer import Trainer
from fusionreid.losses import reid_loss

SOURCES = (
    "kernels/*.py",
    "fusionreid/**/*.py",
    "dataloading/*.py",
    "engine/training/*.py",
    "engine/distributed/*.py",
    "bench/step_baselines.py",
    "bench/model_parts.py",
    "bench/suite_attention.py",
    "bench/suite_triplet.py",
    "bench/suite_loader.py",
)
INSTANCES = 4
TEST_MODEL = {"RES_NAME": "test_resnet", "TRANSFORMER_TYPE": "test_vit", "STRIDE_SIZE": (16, 16), "HTM_LAYER": 1}
PERSONS = 751  # as Market-1501 has
SIZES: dict[str, tuple[int, tuple[int, int], dict[str, Any]]] = {  # images, their height and width, the MODEL section
    "quick": (8, (32, 16), {**TEST_MODEL, "MIX_DIM": 24}),
    "default": (8, (256, 128), {}),
    "full": (128, (256, 128), {}),
}
COMPARED = 8  # weights after an update by the optimiser alone
# Of fp32: the real model's first gradients differ by 3e-2 of the largest. Of an embedding, in mixed precision.
TOLERANCE = {"quick": 1e-3, "default": 0.1, "full": 0.1}
MIXED_TOLERANCE = 3e-2
Call = Callable[[], list[Tensor]]
Step = Callable[[bool], list[Tensor]]  # exact or not


def cases(settings: Settings) -> list[Case]:
    """List the cases of a size."""
    images, (height, width), model = SIZES[settings.size]
    name = "test_resnet and test_vit" if model else f"ResNet-50 and ViT-B/16, stride 12, {PERSONS} persons"
    shape = f"{name}, B {images}, {height} x {width}, {_precision(settings)}"
    setups: dict[str, Callable[[Settings], AbstractContextManager[Work]]] = {
        "training step": training_step,
        "embedding": embedding,
        **{f"{part}, forward and backward": partial(one_part, part=part) for part in PARTS},
        "optimiser": optimiser,
    }
    loaded = Case("images of a batch", f"B {images}, {height} x {width}, uint8 to float32", partial(data, settings))
    return [*(Case(what, shape, partial(setup, settings)) for what, setup in setups.items()), loaded]


@contextmanager
def training_step(settings: Settings) -> Iterator[Work]:
    """Prepare a training step and its alternatives."""
    with _trainer(settings) as (trainer, batch):
        precision = trainer.cfg.SOLVER.PRECISION

        def ours(exact: bool) -> list[Tensor]:
            solver = trainer.cfg.SOLVER.model_copy(update={"PRECISION": "fp32" if exact else precision})
            trainer.train_step.cfg = trainer.cfg.model_copy(update={"SOLVER": solver})
            trainer.train_step.clear()
            trainer.train_step(batch, number=0)
            weights = (parallel.local_shard(p.detach()) for p in trainer.model.parameters())
            report = trainer.train_step.read()
            return [torch.tensor([*report.identity, *report.triplet]), *weights]

        steps: dict[str, Step] = {
            "ours": ours,
            "as published": published_step(as_published(_copy(trainer)), batch, trainer.cfg.SOLVER),
            "plain": plain_step(_copy(trainer), batch, trainer.cfg.SOLVER),
        }
        if settings.compile:
            steps["plain, compiled"] = plain_step(_copy(trainer), batch, trainer.cfg.SOLVER, torch.compile)
        start = _flat(parallel.local_shard(p.detach()) for p in trainer.model.parameters())
        work = _work(
            settings, first_in_fp32(settings, steps), 1.0, lambda result: [result[0], _flat(result[1:]) - start]
        )
        yield replace(work, on_host=True)


@contextmanager
def embedding(settings: Settings) -> Iterator[Work]:
    """Prepare the test vectors of a batch, without the neck, of all heads."""
    with _trainer(settings) as (trainer, batch), parallel.autocast(trainer.cfg.SOLVER.PRECISION, settings.device):
        ours, theirs, images = trainer.model.eval(), as_published(_copy(trainer)).eval(), batch.images.contiguous()

        @torch.no_grad()
        def published() -> list[Tensor]:
            with published_autocast(settings.device):
                return [theirs(images, batch.cameras).embedding()]

        @torch.no_grad()
        def own() -> list[Tensor]:
            return [ours(batch.images, batch.cameras).embedding()]

        work = _work(settings, {"ours": own, "as published": published}, 1 / 3)
        yield replace(work, tolerance=MIXED_TOLERANCE, on_host=True)


@contextmanager
def one_part(settings: Settings, part: str) -> Iterator[Work]:
    """Prepare one part of the model and its alternative."""
    with _trainer(settings) as (trainer, batch):
        ours, theirs = _copy(trainer), as_published(_copy(trainer))
        compile_parts(ours, trainer.cfg.PARALLEL, settings.device)
        device, precision = settings.device, trainer.cfg.SOLVER.PRECISION

        def ours_in(exact: bool) -> torch.autocast:
            return parallel.autocast("fp32" if exact else precision, device)

        theirs_in = partial(published_autocast, device)
        given = prepare(ours, part, batch.images, batch, ours_in)
        their_given = prepare(theirs, part, batch.images.contiguous(), batch, theirs_in)
        their_given[True] = [x.detach().contiguous().clone().requires_grad_(x.requires_grad) for x in given[True]]
        steps = {
            "ours": forward_and_backward(ours, part, given, batch, ours_in, reid_loss),
            "as published": forward_and_backward(theirs, part, their_given, batch, theirs_in, published_loss),
        }
        yield _work(settings, first_in_fp32(settings, steps))


def first_in_fp32(settings: Settings, steps: Mapping[str, Step]) -> dict[str, Call]:
    """Make calls whose first one, which is compared, is exact: untrained batch norms magnify any rounding."""

    def begin(step: Step) -> Call:
        first = iter([True])

        def call() -> list[Tensor]:
            if not next(first, False):
                return step(False)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return step(True)

        return call

    return {name: begin(step) for name, step in steps.items()}


@contextmanager
def optimiser(settings: Settings) -> Iterator[Work]:
    """Prepare the optimiser's step and its alternative."""
    with _trainer(settings) as (trainer, _):
        ours, theirs = _copy(trainer), _copy(trainer)
        solver = trainer.cfg.SOLVER
        fused, plain = Optimizer(ours, solver, settings.device), published_optimizer(theirs, solver)
        fused.set_epoch(1)
        gradients = [torch.randn_like(p) for p in ours.parameters()]
        fine = torch.zeros((), dtype=torch.bool, device=settings.device)

        def step(model: nn.Module, update: Callable[[], object]) -> list[Tensor]:
            for p, gradient in zip(model.parameters(), gradients):
                p.grad = gradient if p.requires_grad else None
            update()
            return [p.detach() for p in list(model.parameters())[:COMPARED]]

        yield _work(
            settings,
            {
                "ours": lambda: step(ours, lambda: fused.step(fine)),
                "as published": lambda: step(theirs, plain.step),
            },
        )


@contextmanager
def data(settings: Settings) -> Iterator[Work]:
    """Prepare a batch: ours are cached images, as in every epoch but the first; others read files in one process."""
    with _trainer(settings, SIZES[settings.size][0] // INSTANCES) as (trainer, batch):
        plan, size, places = trainer.loader.plan(1), SIZES[settings.size][1], range(len(batch.images))
        files = FilesDataset(trainer.split.train, plan, size, by_pillow)
        providers = {
            "ours": lambda: last(loaded.images for loaded in trainer.loader.batches(1)),
            "Pillow and torchvision": lambda: default_collate([files[i] for i in places]).to(settings.device),
        }
        compared = partial(visible, erase=plan.erase)
        yield Work(providers, GREY_LEVELS, items=len(places), compared=compared, on_host=True)


def _work(
    settings: Settings, providers: dict[str, Call], share: float = 0.0, compared: Callable[[Any], list[Tensor]] = list
) -> Work:
    """`share` of the operations of a training step."""
    images, _, model = SIZES[settings.size]
    known = share and not model and settings.device.type == "cuda"  # the largest product is measured in fp32 on a CPU
    operations = share * GFLOP_PER_IMAGE * 1e9 * images if known else None
    return Work(providers, TOLERANCE[settings.size], None, operations, compared, images)


@contextmanager
def _trainer(settings: Settings, persons: int = PERSONS) -> Iterator[tuple[Trainer, Batch]]:
    """Yield a trainer before its first step, and a batch for it."""
    images, (height, width), _ = SIZES[settings.size]
    is_first = not torch.distributed.is_initialized()
    with TemporaryDirectory() as folder:
        with redirect_stdout(StringIO()):
            trainer = Trainer(_config(settings, folder, persons))
        places = torch.arange(images, device=settings.device)
        pixels = torch.randn(images, 3, height, width, device=settings.device)
        try:
            trainer.model.train()
            trainer.optimizer.set_epoch(1)
            yield trainer, Batch(pixels.to(memory_format=torch.channels_last), places // INSTANCES, places % 2, places)
        finally:
            trainer.close()
            if is_first:
                torch.distributed.destroy_process_group()


def _copy(trainer: Trainer) -> FusionReID:
    """Return the trainer's model with its weights of now, neither sharded nor compiled."""
    model = build(trainer.cfg, trainer.split.num_persons, trainer.split.num_cameras).to(trainer.ranks.device)
    model.load_state_dict({name: parallel.full_tensor(t) for name, t in trainer.model.state_dict().items()})
    return model.train()


def _config(settings: Settings, folder: str, persons: int) -> Config:
    images, size, model = SIZES[settings.size]
    persons = images // INSTANCES if model else persons
    rendered = {"PERSONS": persons, "TEST_PERSONS": 1, "CAMERAS": 2, "IMAGES": INSTANCES // 2}
    return Config.from_dict(
        {
            "MODEL": {**model, "PRETRAIN_CHOICE": "none", "DEVICE": settings.device.type},
            "INPUT": {"SIZE_TRAIN": size, "SIZE_TEST": size},
            "DATASETS": {"NAMES": "synthetic", "ROOT_DIR": folder, "SYNTHETIC": rendered},
            "DATALOADER": {"NUM_WORKERS": 0, "NUM_INSTANCE": INSTANCES},
            "SOLVER": {"IMS_PER_BATCH": images, "PRECISION": _precision(settings)},
            "OUTPUT_DIR": f"{folder}/log",
        }
    )


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _precision(settings: Settings) -> str:
    """What training uses on the device."""
    return "bf16" if settings.device.type == "cuda" or parallel.cpu_has_bf16() else "fp32"
