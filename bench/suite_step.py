"""One training step, as the loop takes it, against the plainly written one of the same model on plain torch ops."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.suite_attention import projected_class_attention, sdpa_on_views
from bench.suite_triplet import dense
from bench.timing import Case, Settings, Work
from dataloading.loader import Batch
from engine import parallel
from engine.config import Config
from engine.evaluation import build
from engine.loop import Run
from engine.optim import group_of, learning_rate
from fusionreid import blocks, htm
from fusionreid.drop_path import Draws

SOURCES = ("kernels/*.py", "fusionreid/**/*.py", "engine/step.py", "engine/optim.py", "engine/compiling.py")
INSTANCES = 4
GFLOP_PER_IMAGE = 174.0  # of the published model at 256 x 128, as torch's flop counter finds it
TEST_MODEL = {"RES_NAME": "test_resnet", "TRANSFORMER_TYPE": "test_vit", "STRIDE_SIZE": (16, 16), "HTM_LAYER": 1}
SIZES: dict[str, tuple[int, tuple[int, int], dict[str, Any]]] = {  # images, their height and width, the MODEL section
    "quick": (8, (32, 16), {**TEST_MODEL, "MIX_DIM": 24}),
    "default": (16, (256, 128), {"RES_NAME": "resnet18", "TRANSFORMER_TYPE": "vit_tiny_patch16_224", "MIX_DIM": 192}),
    "full": (128, (256, 128), {}),
}


def cases(settings: Settings) -> list[Case]:
    images, (height, width), model = SIZES[settings.size]
    name = f"{model['RES_NAME']} and {model['TRANSFORMER_TYPE']}" if model else "ResNet-50 and ViT-B/16, stride 12"
    shape = f"B {images}, {height} x {width}, {_precision(settings)}"
    return [Case(f"training step, {name}", shape, partial(training_step, settings))]


@contextmanager
def training_step(settings: Settings) -> Iterator[Work]:
    images, (height, width), model = SIZES[settings.size]
    with TemporaryDirectory() as folder, _run(_config(settings, folder)) as run:
        batch = Batch(
            torch.randn(images, 3, height, width, device=settings.device).to(memory_format=torch.channels_last),
            torch.arange(images, device=settings.device) // INSTANCES,
            torch.arange(images, device=settings.device) % 2,
            torch.arange(images, device=settings.device),
        )

        def ours() -> tuple[Tensor, list[Tensor]]:
            run.train_step.clear()
            run.train_step(batch, number=0)
            weights = [parallel.local_shard(p.detach()) for p in run.model.parameters()]
            return run.train_step.sums[: 2 * len(run.train_step.heads)], weights

        providers: dict[str, Callable[[], Any]] = {"ours": ours, "plain": plain_step(run, batch, compiled=False)}
        if settings.compile:
            providers["plain, compiled"] = plain_step(run, batch, compiled=True)
        operations = None if model else GFLOP_PER_IMAGE * 1e9 * images
        start = _flat(parallel.local_shard(p.detach()) for p in run.model.parameters())
        tolerance = 0.1 if settings.device.type == "cuda" else 1e-3  # of the losses, and of the update of all weights
        yield Work(providers, tolerance, None, operations, lambda result: (result[0], _flat(result[1]) - start))


def plain_step(run: Run, batch: Batch, *, compiled: bool) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """The step as one writes it first, from the very weights that `run` has now."""
    cfg, device = run.cfg, run.ranks.device
    model = build(cfg, run.split.num_persons, run.split.num_cameras).to(device)
    model.load_state_dict({name: parallel.full_tensor(t) for name, t in run.model.state_dict().items()})
    forward: Callable[..., Any] = torch.compile(model) if compiled else model.train()
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(group_of(name, cfg.SOLVER), []).append(p)
    optimizer = torch.optim.SGD(
        [{"params": parameters, "lr": learning_rate(1, rate, cfg.SOLVER), "weight_decay": decay}
         for (rate, decay), parameters in groups.items()], momentum=cfg.SOLVER.MOMENTUM)  # fmt: skip

    draws = Draws(model, cfg.SOLVER.SEED, torch.arange(len(batch.images), device=device))

    def step() -> tuple[Tensor, list[Tensor]]:
        draws.draw(torch.zeros((), dtype=torch.int64, device=device))
        draws.show(slice(None))
        with parallel.autocast(cfg.SOLVER.PRECISION, device), plain_ops():
            outputs = forward(batch.images, batch.cameras)
        identity = torch.stack([F.cross_entropy(x.float(), batch.persons, label_smoothing=0.1) for x in outputs.logits])
        triplet = dense([x.float() for x in outputs.features], batch.persons)
        loss = identity.sum() + triplet.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.cat([identity, triplet]), [p.detach() for p in model.parameters()]

    return step


@contextmanager
def plain_ops() -> Iterator[None]:
    """The model's attention on torch's own ops, whatever the kernels are."""

    def dual(function: Callable[..., Tensor]) -> Callable[..., Any]:
        return lambda a, b=None, scale=None: (
            function(a, scale) if b is None else (function(a, scale), function(b, scale))
        )

    own, across = dual(sdpa_on_views), dual(projected_class_attention)
    with (
        mock.patch.object(blocks, "dual_self_attention", own),
        mock.patch.multiple(htm, dual_self_attention=own, dual_cross_attention=across),
    ):
        yield


@contextmanager
def _run(cfg: Config) -> Iterator[Run]:
    ours = not torch.distributed.is_initialized()
    with redirect_stdout(StringIO()):
        run = Run(cfg)
    try:
        run.model.train()
        run.optimizer.set_epoch(1)
        yield run
    finally:
        for part in (run.loader, run.metrics, run.stop, run.lock):
            if part is not None:
                part.close()
        if ours:
            torch.distributed.destroy_process_group()


def _config(settings: Settings, folder: str) -> Config:
    images, size, model = SIZES[settings.size]
    rendered = {"PERSONS": images // INSTANCES, "TEST_PERSONS": 1, "CAMERAS": 2, "IMAGES": 2, "SIZE": (32, 16)}
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
    return "bf16" if settings.device.type == "cuda" else "fp32"
